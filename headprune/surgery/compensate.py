"""Re-solves output projections after heads are removed, so that each layer gives again what the dense layer gave.

Layer by layer, in order: X are the inputs that the already pruned model really gives to the layer's output projection
(kept heads only), S the residual stream that it adds the result to, Y_0 and S_0 what the dense model's projection and
stream were for the same tokens; W, b minimise ||S + X W^T + b - S_0 - Y_0||^2 + lambda ||W - W_0||^2 (least squares, ridge
towards the old weights; each sample counts alike, whatever its length). So each layer also takes back what the layers
before it left wrong in the stream. Where a site adds to no stream that can be seen, S - S_0 counts as 0. No gradient, no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.gating import output_input_hook
from headprune.models.site import AttentionSite, is_conv1d
from headprune.models.stream import residual_streams
from headprune.models.tokens import token_masks, valid_tokens
from headprune.surgery.normal_equations import Layer, NormalEquations, Solver, get_solver
from headprune.surgery.walk import Keeping, Walk, keeping_for

Reached = tuple[Tensor, Tensor | None]  # the input of an output projection, and the stream that its result is added to
Weights = tuple[Tensor, Tensor | None]  # weight [hidden, features] and bias [hidden] of an output projection
TYPICAL_LENGTH = 64.0  # tokens; a constant, which only keeps the sums of usual batches near sums over tokens
HELD_OUT_EVERY = 5  # each fifth batch chooses the ridge and guards against a re-solve that does not help


@dataclass(frozen=True)
class Resolved:
    """What became of one site: relative squared error of the stream behind it on held-out batches, before and after."""

    site: str
    error_before: float
    error_after: float
    ridge: float | None  # None: the re-solve did not lower the held-out error and was not applied


def resolve_outputs(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    keep: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    method: str = "least_squares",
    progress: Callable[[int, int], None] | None = None,
) -> list[Resolved]:
    """Re-solves the output projection of every site in `keep`, before the cut, in place.

    Afterwards the projections are those of the pruned model: with the other heads gated or cut they reproduce the dense
    outputs as well as least squares can. `sites` must be in the order of the forward pass.

    Args:
        batches: calibration batches, a list or anything that can be read more than once.
        forward: runs the model on a batch; default `model(**batch)`.
        token_mask: bool [batch, tokens] of the tokens that count; default as in headprune.models.tokens.token_masks.
        method: "least_squares", "mask_tuning" (one factor for each head) or "bias" (headprune.surgery.normal_equations).
        progress: called with (layers done, layers).
    """
    solver, training = get_solver(method), model.training
    chosen = [site for site in sites if len(keep.get(site.name, ())) < site.head_map.query_heads and site.name in keep]
    dense = {site.name: weight_and_bias(site) for site in chosen}
    solved: dict[str, Weights] = dict(dense)
    reports = []
    model.eval()
    try:
        with torch.no_grad():
            passes = Passes.of(model, chosen, batches, forward, token_mask)
            walks = [(passes.walk(index), passes.walk(index)) for index in range(len(passes.batches))]
            for done, site in enumerate(chosen):
                train, held_out = gather(passes, site, keep, solved, walks)
                report, solved[site.name] = resolve(site, keep[site.name], dense[site.name], train, held_out, solver)
                reports.append(report)
                if progress:
                    progress(done + 1, len(chosen))
    finally:
        for site in chosen:
            set_weight_and_bias(site, dense[site.name])
        model.train(training)
    for site in chosen:
        set_weight_and_bias(site, solved[site.name])
    return reports


def gather(passes: Passes, site: AttentionSite, keep, solved, walks) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of `site`: the dense model's stream behind it against the inputs that the model pruned so far gives."""
    columns = site.columns(tuple(keep[site.name]))
    weight, _ = passes.dense[site.name]
    kept_weight = weight[:, columns.to(weight.device)]
    train, held_out = (NormalEquations.empty(len(columns), weight.shape[0]) for _ in range(2))
    for index, (dense_walk, pruned_walk) in enumerate(walks):
        target = passes.target(site, dense_walk)
        with passes.pruned(keep, solved, site):
            reached = pruned_walk.to(site, passes.streams.get(site.name))
        valid = passes.valid(site, index, reached[0])
        add_tokens(parts(train, held_out, index, len(walks)), columns, kept_weight, target, reached, valid)
    return train, held_out


def add_tokens(
    sums: Sequence[NormalEquations], columns: Tensor, kept_weight: Tensor, target: Target, reached: Reached, valid: Tensor
) -> None:
    """Adds one batch to `sums`: what the kept columns leave of `target`, against their inputs in the pruned model."""
    inputs, stream = reached
    kept_inputs = inputs[..., columns.to(inputs.device)]
    residual = target.missing(stream) - kept_inputs.float() @ kept_weight.T.float()
    for equations in sums:
        equations.add(kept_inputs[valid], residual[valid], sample_weights(valid))


def sample_weights(valid: Tensor) -> Tensor:
    """[valid tokens] of valid [batch, tokens]: every sample counts alike, however long it is."""
    counts = valid.sum(dim=1, keepdim=True).clamp(min=1)
    return (TYPICAL_LENGTH / counts).expand(valid.shape)[valid]


def parts(train: NormalEquations, held_out: NormalEquations, index: int, batches: int) -> list[NormalEquations]:
    """Which sums the batch `index` goes into; the last of few batches into both."""
    found = [held_out if batches > 1 and is_held_out(index) else train]
    return [*found, held_out] if batches < HELD_OUT_EVERY and index == batches - 1 else found


def is_held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


@dataclass(frozen=True)
class Target:
    """What the dense projection gives but for its bias, and the stream that it adds to; fp32, [batch, tokens, hidden]."""

    projected: Tensor
    stream: Tensor | None

    @classmethod
    def of(cls, reached: Reached, weight: Tensor) -> Target:
        inputs, stream = reached
        return cls(inputs.float() @ weight.T.float(), None if stream is None else stream.float())

    def missing(self, stream: Tensor | None) -> Tensor:
        """What the pruned model's projection is to give where its stream is `stream`."""
        return self.projected if stream is None else self.projected + (self.stream - stream.float())


@dataclass(frozen=True)
class Passes:
    """What all forward passes of a compensation share. sites: those that lose heads, in the order of the pass; dense: their weights
    and biases; streams: the module that receives the stream which a site adds to."""

    model: nn.Module
    sites: tuple[AttentionSite, ...]
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    masks: Callable[[str, Any], Tensor | None]
    dense: Mapping[str, Weights]
    streams: Mapping[str, nn.Module]
    keeping: Keeping

    @classmethod
    def of(cls, model, sites, batches, forward, token_mask) -> Passes:
        """Raises InvalidInput where there are no batches."""
        batches = list(batches)
        if not batches:
            raise InvalidInput("the calibration set is empty; compensation needs at least one batch.")
        forward = forward or (lambda model, batch: model(**batch))
        run = lambda: forward(model, batches[0])  # noqa: E731
        dense = {site.name: weight_and_bias(site) for site in sites}
        streams, keeping = residual_streams(model, sites, run), keeping_for(model, run, sites)
        return cls(model, tuple(sites), batches, forward, token_masks(model, token_mask), dense, streams, keeping)

    def walk(self, index: int) -> Walk:
        """A pass of the batch `index`, before its first step."""
        return Walk(self.model, lambda: self.forward(self.model, self.batches[index]), self.keeping)

    def target(self, site: AttentionSite, walk: Walk) -> Target:
        """What the dense model has behind `site`."""
        with weights_in_place(self.sites, self.dense):
            return Target.of(walk.to(site, self.streams.get(site.name)), self.dense[site.name][0])

    @contextmanager
    def pruned(self, keep: Mapping[str, Sequence[int]], solved: Mapping[str, Weights], but: AttentionSite | None) -> Iterator[None]:
        """Inside the block the model has the weights `solved`, and the heads that are not in `keep` are off, except at `but`."""
        with weights_in_place([site for site in self.sites if site.name in solved], solved), ExitStack() as stack:
            for site in self.sites:
                if site is not but and site.name in keep:
                    stack.enter_context(output_input_hook(site, masked_to(site, keep[site.name])))
            yield

    def valid(self, site: AttentionSite, index: int, states: Tensor) -> Tensor:
        """bool [batch, tokens]: the tokens of the batch `index` that count."""
        return valid_tokens(states, self.masks(site.name, self.batches[index]))


def resolve(site, keep, old, train, held_out, solver: Solver) -> tuple[Resolved, Weights]:
    """The change that leaves the smallest held-out error, and the weights that it gives; the old ones where none helps.

    What the held-out batches have chosen is solved once more with them. Raises InvalidInput for too few tokens.
    """
    weight, bias = old
    columns = site.columns(tuple(keep)).to(weight.device)
    layer = Layer(weight[:, columns], len(keep), bias is not None)
    refuse_too_few(site.name, train.tokens, solver.unknowns(layer))
    before = held_out.error(torch.zeros_like(held_out.cross))
    best, ridge, change = before, None, None
    for candidate, solution in solver.solve(train, layer):
        error = held_out.error(solution)
        if error < best:
            best, ridge, change = error, candidate, solution
    scale = max(before, torch.finfo(torch.float64).tiny)
    report = Resolved(site.name, 1.0 if before else 0.0, best / scale, ridge)
    if change is None:
        return report, old
    change = dict(solver.solve(train + held_out, layer)).get(ridge, change)
    new_weight = weight.clone()
    new_weight[:, columns] += change[:-1].T.to(weight)
    new_bias = None if bias is None else bias + change[-1].to(bias)
    return report, (new_weight, new_bias)


def refuse_too_few(name: str, tokens: int, needed: int) -> None:
    if tokens < needed:
        raise InvalidInput(
            f"compensation has {tokens} calibration tokens at {name} (beside those that are held out); its {needed} unknowns need "
            f"at least {needed}, better {10 * needed}. Give more calibration batches, or compensation='mask_tuning' or 'bias'."
        )


def masked_to(site: AttentionSite, keep: Sequence[int]) -> Callable[[Tensor], Tensor]:
    columns = torch.zeros(site.output.features.numel())
    columns[site.columns(tuple(keep))] = 1.0
    return lambda inputs: inputs * columns.to(inputs)


@contextmanager
def weights_in_place(sites: Sequence[AttentionSite], weights: Mapping[str, Weights]) -> Iterator[None]:
    for site in sites:
        set_weight_and_bias(site, weights[site.name])
    yield


def weight_and_bias(site: AttentionSite) -> Weights:
    """(weight [hidden, features], bias [hidden] or None) of the output projection, detached."""
    module = site.output.module
    weight = module.weight.data
    return (weight.T if is_conv1d(module) else weight), None if module.bias is None else module.bias.data


def set_weight_and_bias(site: AttentionSite, values: Weights) -> None:
    module, (weight, bias) = site.output.module, values
    module.weight.data = weight.T if is_conv1d(module) else weight
    if bias is not None:
        module.bias.data = bias
