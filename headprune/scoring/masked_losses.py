"""The loss of a model under many head masks at once: thousands of candidate prunings in few forward passes.

Masks are folded into the batch: the batch is run several times over in one pass, each time with its own gates at the output
projections' inputs. Masks that leave the first layers whole start behind them (replay.py), so that all heads of a layer are
removed one by one in few short passes. A loss that couples samples is right as well: it is called once for each mask,
with the model's output for that mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name
from headprune.models import attention_sites
from headprune.models.batches import why_infinite
from headprune.models.gating import gate_columns, output_input_hook
from headprune.models.replaced import replaced_forward
from headprune.models.site import AttentionSite
from headprune.nn.replace import own_attention
from headprune.scoring.folding import batch_size, fold
from headprune.scoring.observer import LossFunction, checked_losses
from headprune.scoring.passes import frozen, pass_of
from headprune.scoring.replay import recording
from headprune.scoring.run_structure import RunStructure, folded_pass, run_structure
from headprune.scoring.sample_losses import OwnLoss, close, tolerance_of

log = logging.getLogger("headprune")
ROWS = {"cpu": 16}  # of a pass by default: more only leaves the caches
ROWS_ELSEWHERE = 64

Masks = Mapping[str, Tensor]


def masked_losses(
    model: nn.Module, batch: Any, masks: Masks, *, loss_fn: LossFunction | None = None, rows: int | None = None
) -> Tensor:
    """Each sample's loss under each mask, [n_masks, samples], fp32, on the CPU.

    Args:
        batch: a dict for `model(**batch)` with labels, or what `loss_fn` understands.
        masks: site name -> gates [n_masks, query_heads], 0 or 1 or any factor; sites left out keep all heads.
        loss_fn: `loss_fn(model, batch)` gives per-sample losses [n] or their mean; default: the model's own, by sample.
        rows: how many samples one pass may hold, by default 16 on a CPU and 64 elsewhere; halved where memory does not hold
            them. A batch larger than that is run once per mask.

    Raises InvalidInput for masks of an unknown site or another shape, of a site that the batch does not run through, for a
    loss that is missing, unknown or not finite.
    """
    check_arguments(masked_losses, locals())
    with own_attention(model):
        return MaskedLosses(model, attention_sites(model, quantised=True), loss_fn, rows).on(batch).losses(masks)


@dataclass
class DensePass:
    """One pass with all heads: losses [samples] or their mean; the model's calls (args, kwargs) and outputs; the sites in
    the order reached; results of calls that replays take from it."""

    losses: Tensor = field(default_factory=lambda: torch.zeros(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    reached: dict[str, None] = field(default_factory=dict)
    stored: dict[int, Any] = field(default_factory=dict)


class MaskedLosses:
    """Masked losses for many batches of one model. What a pass looks like is found out, and checked, on the first batch:
    where it cannot start again at a site masks are folded into whole passes, and where not even that, run one by one."""

    def __init__(
        self, model: nn.Module, sites: Sequence[AttentionSite], loss_fn: LossFunction | None = None, rows: int | None = None
    ) -> None:
        if rows is not None and rows < 1:
            raise InvalidInput(f"rows is {rows}; expected at least 1 sample a pass.")
        self.model, self.loss_fn = model, loss_fn or OwnLoss()
        self.place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.fills = self.place.type != "cpu"  # passes, with masks that start at different sites (MaskedBatch.together)
        self.rows = rows or ROWS.get(self.place.type, ROWS_ELSEWHERE)
        self.sites = {site.name: site for site in sites}
        self.structure: RunStructure | None = None
        self.folds = True  # until a model or its loss does not allow it
        self._said: set[str] = set()

    def on(self, batch: Any) -> MaskedBatch:
        """Runs `batch` once with all heads, and keeps what replays need."""
        with self.still():
            found = self.dense_pass(batch)
            if self.folds and not self.fits(found):
                self.learn(batch, found)
                found = self.dense_pass(batch)
                if self.folds and not self.fits(found):  # hp.causal_losses
                    self.run_singly("the loss runs parts of the model beside its call")
        return MaskedBatch(self, batch, found, self.structure)

    def dense_pass(self, batch: Any) -> DensePass:
        found = DensePass()

        def noting(name: str) -> Callable[[Tensor], None]:
            return lambda _inputs: found.reached.setdefault(name)

        with ExitStack() as stack:
            for name, site in self.sites.items():
                stack.enter_context(output_input_hook(site, noting(name)))
            if self.structure:
                stack.enter_context(recording(self.structure.calls, list(self.structure.plans.values()), found.stored))
            found.losses = self.sample_losses(batch, found)
        if not torch.isfinite(found.losses).all():
            raise InvalidInput(f"the loss is NaN or infinite on a batch; {why_infinite(batch)}.")
        return found

    def fits(self, found: DensePass) -> bool:
        """Whether the structure that is known is that of this pass."""
        structure = self.structure
        return (
            structure is not None
            and len(found.calls) == 1
            and tree_flatten(found.calls[0])[1] == structure.form
            and list(found.reached) == list(structure.gate_dim)
            and structure.wanted <= set(found.stored)
        )

    def learn(self, batch: Any, dense: DensePass) -> None:
        """Finds the structure of this batch's pass, or says why there is none and folds no more."""
        if len(dense.calls) != 1:
            return self.run_singly(f"the loss calls the model {len(dense.calls)} times")
        structure = run_structure(self.model, self.sites, dense.calls[0], tolerance_of(self.model))
        if structure is None or list(structure.gate_dim) != list(dense.reached):
            return self.run_singly("masks cannot be folded into its batch")
        try:
            of_one_fold = self.losses_of(fold(dense.outputs[0], structure.output, 1, 0), batch)
        except (InvalidInput, TypeError, AttributeError):
            of_one_fold = dense.losses.new_full(dense.losses.shape, torch.nan)
        if not close(of_one_fold, dense.losses, self.model):
            return self.run_singly("the loss function reads more than each sample's outputs, for instance their mean loss")
        self.structure = structure
        return None

    def run_singly(self, why: str) -> None:
        self.folds, self.structure = False, None
        self.say(f"{why}: each mask is run by itself, which is slower")

    def say(self, what: str) -> None:
        if what not in self._said:
            log.warning("%s: %s", type(self.model).__name__, what)
        self._said.add(what)

    def sample_losses(self, batch: Any, found: DensePass | None = None) -> Tensor:
        """[samples], or their mean. With `found` the model's own calls are noted there."""
        forward = self.model.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            kwargs |= {"use_cache": False} if kwargs.get("use_cache") else {}
            output = forward(*args, **kwargs)
            if found is not None:
                found.calls.append((args, kwargs))
                found.outputs.append(output)
            return output

        with ExitStack() as stack:
            if found is not None:
                stack.enter_context(replaced_forward(self.model, noting))
            return checked_losses(self.loss_fn(self.model, batch))

    def losses_of(self, output: Any, batch: Any) -> Tensor:
        """The sample losses where the model's call gives `output`."""
        with replaced_forward(self.model, lambda *_args, **_kwargs: output):
            return self.sample_losses(batch)

    def alone(self, batch: Any, gates: Masks) -> Tensor:
        """The sample losses under one mask: site name -> [query_heads]."""
        with ExitStack() as stack:
            for name, row in gates.items():
                site = self.sites[name]
                stack.enter_context(output_input_hook(site, gate_columns(site.by_column(row))))
            return self.sample_losses(batch)

    @contextmanager
    def still(self, grad: bool = False) -> Iterator[None]:
        """In eval mode, without caches (a replay would add to them), and without gradients but those of gates."""
        with pass_of(self.model), without_caches(self.model), torch.set_grad_enabled(grad), ExitStack() as stack:
            if grad:
                stack.enter_context(frozen(self.model))
            yield


class MaskedBatch:
    """One batch of MaskedLosses. structure: of its own pass, since a later batch may run otherwise; None where each mask is run by
    itself. dense: its losses with all heads, [samples], fp32, on the CPU. reached: names of the sites that it runs through, in
    order."""

    def __init__(self, owner: MaskedLosses, batch: Any, dense: DensePass, structure: RunStructure | None) -> None:
        self.owner, self.batch, self._pass, self.structure = owner, batch, dense, structure
        self.reached = tuple(dense.reached)
        self.dense = self.by_sample(dense.losses).cpu()

    @property
    def samples(self) -> int:
        """How many samples the model's call holds."""
        if self.structure is not None:
            return batch_size(self._pass.calls[0], self.structure.arguments)
        tensors = [leaf for leaf in tree_flatten(self._pass.calls)[0] if isinstance(leaf, Tensor) and leaf.dim()]
        return tensors[0].shape[0] if tensors else 1

    def by_sample(self, losses: Tensor) -> Tensor:
        """[samples], fp32; a mean counts for each of its samples."""
        return (losses if losses.dim() else losses.expand(self.samples)).detach().float()

    def losses(self, masks: Masks) -> Tensor:
        """[n_masks, samples], fp32, on the CPU; see `masked_losses`."""
        gates = self.checked(masks)
        found = self.dense.repeat(len(next(iter(gates.values()))), 1)
        changed = torch.stack([(rows != 1).any(dim=1) for rows in gates.values()])
        with self.owner.still():
            for position, chosen in self.together(changed):
                later = dict(list(gates.items())[position:])
                found[chosen] = self.starting_at(list(gates)[position], {name: rows[chosen] for name, rows in later.items()})
        if not torch.isfinite(found).all():
            raise InvalidInput("the loss is NaN or infinite under some head masks; is the model in too low a precision?")
        return found

    def checked(self, masks: Masks) -> dict[str, Tensor]:
        """The gates of all reached sites, in the order reached."""
        sites, counts = self.owner.sites, {len(rows) for rows in masks.values()}
        if len(counts) != 1:
            raise InvalidInput(f"masks of {sorted(counts)} rows; expected the same number for every site, and one site at least.")
        for name, rows in masks.items():
            if name not in sites:
                raise unknown_name("attention site", name, sites)
            heads = sites[name].head_map.query_heads
            if rows.dim() != 2 or rows.shape[1] != heads:
                raise InvalidInput(f"masks of {name} have shape {list(rows.shape)}; expected [n_masks, {heads}].")
            if name not in self.reached and bool((rows != 1).any()):
                raise InvalidInput(f"{name} is not reached by this batch; give data that runs through it, or leave it out.")
        opened = {name: torch.ones(*counts, sites[name].head_map.query_heads) for name in self.reached}
        return {name: masks[name].detach().float().cpu() if name in masks else rows for name, rows in opened.items()}

    def together(self, changed: Tensor) -> list[tuple[int, Tensor]]:
        """(first site that some mask changes, masks) of the passes. changed: bool [sites, masks].

        On a CPU only masks that start at the same site share a pass: arithmetic is what it costs. Elsewhere the many small kernels
        of a short pass are, so that passes are filled.
        """
        start = changed.float().argmax(dim=0)
        order = start.argsort(stable=True)
        order = order[changed.any(dim=0)[order]]
        if self.owner.fills:
            parts = order.split(max(1, self.owner.rows // self.samples))
        else:
            parts = order.split(start[order].unique_consecutive(return_counts=True)[1].tolist())
        return [(int(start[part[0]]), part) for part in parts if len(part)]

    def starting_at(self, name: str, gates: dict[str, Tensor]) -> Tensor:
        """[masks, samples] of masks that change nothing before site `name`."""
        owner = self.owner
        if self.structure is None:
            singly = [{other: rows[0] for other, rows in part.items()} for part in self.parts(gates, rows=1)]
            return torch.stack([self.by_sample(owner.alone(self.batch, row)) for row in singly]).cpu()
        start = name if self.structure.replays(name) else None
        if start is None:
            owner.say("a pass cannot start again at every attention: some are run as a whole")
        return torch.cat([self.run(part, start) for part in self.parts(gates)])

    def parts(self, gates: dict[str, Tensor], rows: int | None = None) -> list[dict[str, Tensor]]:
        """The masks in parts of about equal size, each of at most `rows` (default: the owner's) samples, or one mask."""
        count = len(next(iter(gates.values())))
        size = max(1, (rows or self.owner.rows) // self.samples)
        pieces = {name: found.chunk(-(-count // size)) for name, found in gates.items()}
        return [dict(zip(pieces, parts)) for parts in zip(*pieces.values())]

    def folded_pass(self, gates: dict[str, Tensor], times: int, start: str | None = None) -> list[Any]:
        """The output for each mask, from one pass."""
        owner, found, structure = self.owner, self._pass, self.structure
        assert structure is not None  # else each mask is run by itself
        gates = {name: rows.to(owner.place) for name, rows in gates.items()}
        output = folded_pass(owner.model, owner.sites, structure, found.calls[0], gates, times, start, found.stored)
        return [fold(output, structure.output, times, index) for index in range(times)]

    def run(self, gates: dict[str, Tensor], start: str | None) -> Tensor:
        """[masks, samples] by one pass; by several smaller ones where memory does not hold it."""
        owner, count = self.owner, len(next(iter(gates.values())))
        changed = {name: rows for name, rows in gates.items() if bool((rows != 1).any())}
        try:
            outputs = self.folded_pass(changed, count, start)
            return torch.stack([self.by_sample(owner.losses_of(output, self.batch)) for output in outputs]).cpu()
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        owner.rows = max(1, count * self.samples // 2)
        return torch.cat([self.run(part, start) for part in self.parts(gates)])


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """No transformers module keeps keys and values inside the block."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    cached: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
