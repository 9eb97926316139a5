"""The loss of a model under many head masks at once: thousands of candidate prunings in few forward passes.

Masks are folded into the batch: the batch is run several times over in one pass, each time with its own gates at the output
projections' inputs. Masks that leave the first layers whole start behind them (replay.py), so that all heads of a layer are
removed one by one in few short passes. A loss that couples samples is right as well: it is called once for each mask,
with the model's output for that mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from headprune.errors import InvalidInput, unknown_name
from headprune.models import attention_sites
from headprune.models.gating import gate_columns, output_input_hook
from headprune.models.site import AttentionSite
from headprune.scoring.folding import batch_size, fold, folded
from headprune.scoring.observe import frozen, in_eval_mode
from headprune.scoring.observer import LossFunction
from headprune.scoring.replay import Call, recording, replaced_forward, replaying, tracing
from headprune.scoring.run_structure import RunStructure, gate_rows, run_structure
from headprune.scoring.sample_losses import OwnLoss, close

log = logging.getLogger("headprune")
ROWS = 32

Masks = Mapping[str, Tensor]


def masked_losses(
    model: nn.Module, batch: Any, masks: Masks, *, loss_fn: LossFunction | None = None, rows: int = ROWS
) -> Tensor:
    """Each sample's loss under each mask, [n_masks, samples], fp32, on the CPU.

    Args:
        batch: a dict for `model(**batch)` with labels, or what `loss_fn` understands.
        masks: site name -> gates [n_masks, query_heads], 0 or 1 or any factor; sites left out keep all heads.
        loss_fn: `loss_fn(model, batch)` gives per-sample losses [n] or their mean; default: the model's own, by sample.
        rows: how many samples one pass may hold; a batch larger than that is run once per mask.

    Raises InvalidInput for masks of an unknown site or another shape, of a site that the batch does not run through, for a
    loss that is missing, unknown or not finite.
    """
    return MaskedLosses(model, attention_sites(model), loss_fn, rows).on(batch).losses(masks)


class MaskedLosses:
    """Masked losses for many batches of one model. What a pass looks like is found out, and checked, on the first batch:
    where the model cannot be replayed masks are folded only, and where not even that, they are run one by one."""

    def __init__(
        self, model: nn.Module, sites: Sequence[AttentionSite], loss_fn: LossFunction | None = None, rows: int = ROWS
    ) -> None:
        if rows < 1:
            raise InvalidInput(f"rows is {rows}; expected at least 1 sample a pass.")
        self.model, self.rows, self.loss_fn = model, rows, loss_fn or OwnLoss()
        self.sites = {site.name: site for site in sites}
        self.structure: RunStructure | None = None
        self.replays, self.folds = True, True  # until a check fails
        self.verified: set[str] = set()  # sites from which replays gave the right losses
        self._said: set[str] = set()

    def on(self, batch: Any) -> MaskedBatch:
        """Runs `batch` once with all heads, and keeps what replays need."""
        with self.still():
            found = self.dense_pass(batch)
            if self.folds and not found.fits:
                self.structure = self.learnt(batch, found)
                self.verified.clear()
                if self.structure is None:
                    self.say("masks of this model cannot be folded into its batch; each one is run by itself")
                    self.folds = False
                found = self.dense_pass(batch)
        return MaskedBatch(self, batch, found)

    def dense_pass(self, batch: Any) -> DensePass:
        found = DensePass()
        plans = list(self.structure.plans.values()) if self.structure and self.replays else []
        with ExitStack() as stack:
            for site in self.sites.values():
                stack.enter_context(output_input_hook(site, lambda _inputs, name=site.name: found.reached.setdefault(name)))
            if self.structure:
                stack.enter_context(recording(self.structure.calls, plans, found.stored))
            found.losses = self.sample_losses(batch, found)
        if not torch.isfinite(found.losses).all():
            raise InvalidInput("the loss is NaN or infinite on a batch; look for empty labels or overflow in low precision.")
        wanted = {index for plan in plans for taken in plan.values() for index in taken if index is not None}
        found.fits = (
            self.structure is not None
            and len(found.calls) == 1
            and tree_flatten(found.calls[0])[1] == self.structure.form
            and list(found.reached) == list(self.structure.gate_dim)
            and wanted <= set(found.stored)
        )
        return found

    def sample_losses(self, batch: Any, found: DensePass | None = None) -> Tensor:
        """[samples]; a mean counts for each of its samples. With `found` the model's own calls are noted there."""
        forward = self.model.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            kwargs |= {"use_cache": False} if kwargs.get("use_cache") else {}
            found.calls.append((args, kwargs))
            return forward(*args, **kwargs)

        with ExitStack() as stack:
            if found is not None:
                stack.enter_context(replaced_forward(self.model, noting))
            losses = self.loss_fn(self.model, batch)
        if not isinstance(losses, Tensor) or losses.dim() > 1:
            shown = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InvalidInput(f"loss_fn gave {shown}; expected per-sample losses [n] or their mean.")
        return losses

    def learnt(self, batch: Any, dense: DensePass) -> RunStructure | None:
        """The structure of this batch's pass, checked against one with the first site closed."""
        if len(dense.calls) != 1 or not dense.reached:
            return None
        args, kwargs = dense.calls[0]
        with tracing(self.model) as traced:
            self.model(*args, **kwargs)
        first = self.sites[next(iter(dense.reached))]
        closed = self.alone(batch, {first.name: torch.zeros(first.head_map.query_heads)})

        def same(output: Any) -> bool:
            return close(self.losses_of(output, batch), dense.losses, self.model)

        for batch_dim in (0, 1):
            structure = self.tried(dense.calls[0], traced, batch_dim, same)
            if structure is None or list(structure.gate_dim) != list(dense.reached):
                continue
            gates = torch.stack([torch.ones(first.head_map.query_heads), torch.zeros(first.head_map.query_heads)])
            output = self.folded_pass(structure, dense, {first.name: gates})
            found = [self.losses_of(fold(output, structure.output, 2, index), batch) for index in range(2)]
            if close(found[0], dense.losses, self.model) and close(found[1], closed, self.model):
                return structure
        return None

    def tried(self, call: tuple, traced: list[Call], batch_dim: int, same: Any) -> RunStructure | None:
        try:
            return run_structure(self.model, list(self.sites.values()), call, traced, batch_dim, same)
        except (InvalidInput, TypeError, AttributeError):
            return None  # the loss function cannot read one fold's output, for instance a mean loss of the model's own

    def losses_of(self, output: Any, batch: Any) -> Tensor:
        """The sample losses where the model's call gives `output`."""
        with replaced_forward(self.model, lambda *_args, **_kwargs: output):
            return self.sample_losses(batch)

    def folded_pass(
        self, structure: RunStructure, dense: DensePass, gates: Mapping[str, Tensor], start: str | None = None, times: int = 0
    ) -> Any:
        """The model's output for the batch taken once per row of the gates (or `times` times), replayed up to `start`."""
        times = times or len(next(iter(gates.values())))
        args, kwargs = folded(dense.calls[0], structure.arguments, times)
        with ExitStack() as stack:
            for name, rows in gates.items():
                hook = gate_rows(self.sites[name], rows, structure.gate_dim[name])
                stack.enter_context(output_input_hook(self.sites[name], hook))
            if start is not None:
                stack.enter_context(replaying(structure.plans[start], dense.stored, structure.dims, times))
            return self.model(*args, **kwargs)

    def alone(self, batch: Any, gates: Masks) -> Tensor:
        """The sample losses under one mask: site name -> [query_heads]."""
        with ExitStack() as stack:
            for name, row in gates.items():
                site = self.sites[name]
                stack.enter_context(output_input_hook(site, gate_columns(row[site.head_of_column()])))
            return self.sample_losses(batch)

    @contextmanager
    def still(self, grad: bool = False) -> Iterator[None]:
        """In eval mode, without caches (a replay would add to them), and without gradients but those of gates."""
        with in_eval_mode(self.model), without_caches(self.model), torch.set_grad_enabled(grad), ExitStack() as stack:
            if grad:
                stack.enter_context(frozen(self.model))
            yield

    def say(self, what: str) -> None:
        if what not in self._said:
            log.warning("%s: %s", type(self.model).__name__, what)
        self._said.add(what)


@dataclass
class DensePass:
    """One pass with all heads: losses [samples]; the model's calls (args, kwargs); the sites in the order reached; results
    of calls that replays take from it; whether the structure that is known fits it."""

    losses: Tensor = field(default_factory=lambda: torch.zeros(0))
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    reached: dict[str, None] = field(default_factory=dict)
    stored: dict[int, Any] = field(default_factory=dict)
    fits: bool = False


class MaskedBatch:
    """One batch of MaskedLosses."""

    def __init__(self, owner: MaskedLosses, batch: Any, dense: DensePass) -> None:
        self.owner, self.batch, self._dense = owner, batch, dense
        self.dense = self.by_sample(dense.losses)  # [samples], fp32, on the CPU
        self.reached = tuple(dense.reached)

    @property
    def samples(self) -> int:
        """How many samples the model's call holds."""
        structure = self.owner.structure
        if structure is not None:
            return batch_size(self._dense.calls[0], structure.arguments)
        tensors = [leaf for leaf in tree_flatten(self._dense.calls)[0] if isinstance(leaf, Tensor) and leaf.dim()]
        return tensors[0].shape[0] if tensors else 1

    def by_sample(self, losses: Tensor) -> Tensor:
        return (losses if losses.dim() else losses.expand(self.samples)).detach().float().cpu()

    def losses(self, masks: Masks) -> Tensor:
        """[n_masks, samples], fp32, on the CPU; see `masked_losses`."""
        gates = self.checked(masks)
        found = self.dense.repeat(len(next(iter(gates.values()))), 1)
        changed = torch.stack([(rows != 1).any(dim=1) for rows in gates.values()])
        start = changed.float().argmax(dim=0)
        with self.owner.still():
            for position, name in enumerate(gates):
                chosen = (changed.any(dim=0) & (start == position)).nonzero().flatten()
                if len(chosen):
                    later = dict(list(gates.items())[position:])
                    found[chosen] = self.group({other: rows[chosen] for other, rows in later.items()}, name)
        if not torch.isfinite(found).all():
            raise InvalidInput("the loss is NaN or infinite under some head masks; is the model in too low a precision?")
        return found

    def checked(self, masks: Masks) -> dict[str, Tensor]:
        """The gates of all reached sites, in the order reached."""
        owner, counts = self.owner, {len(rows) for rows in masks.values()}
        if len(counts) != 1:
            raise InvalidInput(f"masks of {sorted(counts)} rows; expected the same number for every site, and one site at least.")
        for name, rows in masks.items():
            if name not in owner.sites:
                raise unknown_name("attention site", name, owner.sites)
            heads = owner.sites[name].head_map.query_heads
            if rows.dim() != 2 or rows.shape[1] != heads:
                raise InvalidInput(f"masks of {name} have shape {list(rows.shape)}; expected [n_masks, {heads}].")
            if name not in self._dense.reached and bool((rows != 1).any()):
                raise InvalidInput(f"{name} is not reached by this batch; give data that runs through it, or leave it out.")
        open_gates = {name: torch.ones(*counts, owner.sites[name].head_map.query_heads) for name in self.reached}
        return {name: masks[name].detach().float().cpu() if name in masks else rows for name, rows in open_gates.items()}

    def group(self, gates: dict[str, Tensor], start: str) -> Tensor:
        """[masks, samples] of masks that change nothing before `start`, in passes of about equal size."""
        owner, count = self.owner, len(gates[start])
        if owner.structure is None:
            rows = [owner.alone(self.batch, {name: found[index] for name, found in gates.items()}) for index in range(count)]
            return torch.stack([self.by_sample(row) for row in rows])
        if owner.replays and start not in owner.verified:
            self.verify(gates, start)
        return torch.cat([self.run(part, start) for part in self.parts(gates)])

    def parts(self, gates: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        count = len(next(iter(gates.values())))
        size = max(1, self.owner.rows // self.samples)
        pieces = {name: rows.chunk(-(-count // size)) for name, rows in gates.items()}
        return [dict(zip(pieces, parts)) for parts in zip(*pieces.values())]

    def single_masks(self, gates: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        count = len(next(iter(gates.values())))
        return [{name: rows[index : index + 1] for name, rows in gates.items()} for index in range(count)]

    def folded_pass(self, gates: dict[str, Tensor], start: str | None = None, times: int = 0) -> Any:
        return self.owner.folded_pass(self.owner.structure, self._dense, gates, start, times)

    def run(self, gates: dict[str, Tensor], start: str) -> Tensor:
        """[masks, samples]; in halves where the memory does not hold all at once."""
        owner, count = self.owner, len(gates[start])
        try:
            changed = {name: rows for name, rows in gates.items() if bool((rows != 1).any())} or {start: gates[start]}
            output = self.folded_pass(changed, start if owner.replays else None)
            folds = (fold(output, owner.structure.output, count, index) for index in range(count))
            return torch.stack([self.by_sample(owner.losses_of(one, self.batch)) for one in folds])
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        owner.rows = max(1, min(owner.rows, count * self.samples) // 2)
        return torch.cat([self.run(part, start) for part in self.parts(gates)])

    def verify(self, gates: dict[str, Tensor], start: str) -> None:
        """Replays from `start` with all heads and with its heads closed; without replays from now on where that is wrong."""
        owner = self.owner
        heads = gates[start].shape[1]
        pair = {start: torch.stack([torch.ones(heads), torch.zeros(heads)])}
        try:
            found = self.run(pair, start)
            right = close(found[0], self.dense, owner.model)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            right = False
        if not right:
            owner.say(f"a pass cannot start again at {start}; masks are folded into whole passes")
            owner.replays = False
        owner.verified.add(start)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """No transformers module keeps keys and values inside the block."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
