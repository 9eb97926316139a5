"""Observes the gate gradients of every head and sample, with all weights frozen.

With a gate on head h, dL/dgate_h of one sample is the sum over its tokens of <O_h, dL/dO_h> (Michel, Levy, Neubig 2019,
eq. 4): all that is needed is the output projection's input and its gradient, so no gate is multiplied in. The input is kept
by reference: our attention and SDPA keep the same memory for their own backward pass. Every model takes this one path; a gate
handed to our attention gives the same sums, in no less time on a CPU (bench/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.models.adapters import warn_once
from headprune.models.gating import output_input_hooks
from headprune.models.packed import count_samples, is_packed, picture_lengths, sample_lengths
from headprune.models.site import AttentionSite
from headprune.models.stream import first_tensor
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes
from headprune.scoring.observers.sample_rows import SampleRows


class _Tap(torch.autograd.Function):
    """Identity whose backward hands (input, gradient) to `seen`. `anchor` starts the graph at the first frozen layer."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, seen: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.seen = seen
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.seen(inputs, grad)
        return (grad if ctx.needs_input_grad[0] else None), None, None


def sample_count(
    batch: Any, loss: Tensor, sites: Sequence[AttentionSite], rows: Mapping[str, Tensor], packed: Set[str] = frozenset()
) -> int:
    """How many samples `batch` has: as many as losses, as rows [samples, heads] at a site (as it says itself, where sites differ),
    or (all windowed) as rows of its first tensor."""
    if loss.dim():
        return loss.shape[0]
    whole = [rows[site.name].shape[0] for site in sites if site.name in rows and not (site.windowed or site.name in packed)]
    said = count_samples(batch)
    if said is not None and (said in whole or (packed and not whole)):
        return said
    return max(whole, default=0) if whole or not rows else rows_of(batch)


def rows_of(batch: Any) -> int:
    """Rows of the batch's first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    first = first_tensor(tuple(batch.values()) if isinstance(batch, Mapping) else tuple(batch))
    return 0 if first is None else first.shape[0]


def of_sequences(site: str, grads: Tensor, samples: int, rows: int) -> Tensor:
    """Where an attention runs more sequences than the loss gives samples: the batch's own `rows` (texts that are compared with each
    other), or another form of it (rows of a picture, tokens first), of which one sample alone tells whose they are."""
    if samples == 1:
        return grads.sum(dim=0, keepdim=True)
    if len(grads) != rows:
        warn_once(
            f"{site} runs {len(grads)} sequences where the loss gives {samples} samples; each sequence counts as a sample. Batches "
            "of one sample count it once."
        )
    return grads


@observes(Need.GATE_GRADIENT)
class GateGradients(Observer):
    """One row of gate gradients per sample and site. A mean loss (a scalar) is scaled up by the number of its samples."""

    runs = "backward"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._rows = SampleRows(setting, ("gate_gradient",))
        self._batch: dict[str, Tensor] = {}
        self._packed: set[str] = set()  # of this batch, the sites whose rows are tokens
        self._reached: set[str] = set()
        self._features = {site.name: site.output.features for site in setting.sites}

    def watching_batch(self, batch: Any) -> AbstractContextManager[object]:
        self._forget_batch()
        return output_input_hooks(self.setting.sites, self._tap)

    def after_batch(self, batch: Any, loss: Tensor | None) -> None:
        assert loss is not None  # of a backward pass
        self._reached |= set(self._batch)
        samples = sample_count(batch, loss, self.setting.sites, self._batch, self._packed)
        for site in self.setting.sites:
            # The loss of a batch that does not run through a site does not depend on its gates.
            grads = self._batch.get(site.name, torch.zeros(samples, site.head_map.query_heads))
            lengths_of = sample_lengths if site.name in self._packed else picture_lengths
            lengths = lengths_of(self.setting.model, site.name, batch, len(grads), samples)
            if lengths is not None:
                grads = torch.stack([own.sum(dim=0) for own in grads.split(lengths)])
            elif site.windowed:
                grads = (
                    grads.unflatten(0, (-1, samples)).sum(dim=0) if site.in_turn else grads.unflatten(0, (samples, -1)).sum(dim=1)
                )
            elif loss.dim() and len(grads) != samples:
                grads = of_sequences(site.name, grads, samples, rows_of(batch))
            self._rows.add(site.name, gate_gradient=grads * samples if loss.dim() == 0 else grads)
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._batch.clear()
        self._packed.clear()

    def found(self) -> dict[str, dict[str, Tensor]]:
        return self._rows.found()

    def reached(self) -> set[str]:
        return set(self._reached)

    def _tap(self, site: AttentionSite) -> Callable[[Tensor], Tensor | None]:
        name = site.name

        def seen(inputs: Tensor, grad: Tensor) -> None:
            if inputs.dim() not in (2, 3) and not site.windowed:
                raise InvalidInput(f"{site.output.name} receives {list(inputs.shape)}; expected [batch, tokens, features].")
            columns = inputs.to(torch.float32, copy=True).mul_(grad)
            columns = columns if is_packed(inputs) else columns.flatten(1, -2).sum(dim=1)
            features = self._features[name] = self._features[name].to(columns.device)
            found = columns[:, features].sum(dim=2)
            earlier = self._batch.get(name)
            if is_packed(inputs):
                self._packed.add(name)
                self._batch[name] = found if earlier is None else torch.cat([found, earlier])  # the last call comes first
            else:
                self._batch[name] = found if earlier is None else earlier + found

        def tap(inputs: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            tapped: Tensor = _Tap.apply(inputs, inputs.new_zeros((), requires_grad=True), seen)  # type: ignore[no-untyped-call]  # torch's
            return tapped

        return tap
