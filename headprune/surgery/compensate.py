"""Re-solves output projections after heads are removed, so that each layer gives again what the dense layer gave.

Layer by layer, in order: X are the inputs that the already pruned model really gives to the layer's output projection
(kept heads only), S the residual stream that it adds the result to, Y_0 and S_0 what the dense model's projection and
stream were for the same tokens; W, b minimise ||S + X W^T + b - S_0 - Y_0||^2 + lambda ||W - W_0||^2 (least squares, ridge
towards the old weights). So each layer also takes back what the layers before it left wrong in the stream. Where a site
adds to no stream that can be seen, S - S_0 counts as 0. No gradient, no training.
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
from headprune.surgery.walk import Walk, keeping_for

Reached = tuple[Tensor, Tensor | None]  # inputs of a site's output projection, and the stream that its result is added to
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
    solver = get_solver(method)
    batches = list(batches)
    if not batches:
        raise InvalidInput("the calibration set is empty; compensation needs at least one batch.")
    forward = forward or (lambda model, batch: model(**batch))
    masks = token_masks(model, token_mask)
    training = model.training
    model.eval()
    chosen = [site for site in sites if len(keep.get(site.name, ())) < site.head_map.query_heads and site.name in keep]
    dense = {site.name: weight_and_bias(site) for site in chosen}
    solved: dict[str, tuple[Tensor, Tensor | None]] = dict(dense)
    reports = []
    try:
        with torch.no_grad():
            streams = residual_streams(model, chosen, lambda: forward(model, batches[0]))
            keeping = keeping_for(model, lambda: forward(model, batches[0]), chosen)
            walks = [tuple(Walk(model, lambda batch=batch: forward(model, batch), keeping) for _ in range(2)) for batch in batches]
            for done, site in enumerate(chosen):
                stream = streams.get(site.name)
                train, held_out = gather(site, stream, chosen, keep, dense, solved, batches, walks, masks)
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


def gather(site, stream, chosen, keep, dense, solved, batches, walks, masks) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of `site`: the dense model's stream behind it against the inputs that the model pruned so far gives."""
    columns = site.columns(tuple(keep[site.name]))
    weight, _ = dense[site.name]
    train, held_out = (NormalEquations.empty(len(columns), weight.shape[0]) for _ in range(2))
    for index, (batch, (dense_walk, pruned_walk)) in enumerate(zip(batches, walks)):
        with weights_in_place(chosen, dense):
            dense_inputs, dense_stream = dense_walk.to(site, stream)
        with weights_in_place(chosen, solved), ExitStack() as stack:
            for other in chosen:
                if other is not site:
                    stack.enter_context(output_input_hook(other, masked_to(other, keep[other.name])))
            inputs, pruned_stream = pruned_walk.to(site, stream)
        dense_side, pruned_side = (dense_inputs, dense_stream), (inputs, pruned_stream)
        equations = equations_of(index, len(batches), train, held_out)
        add_tokens(equations, columns, weight, dense_side, pruned_side, masks(site.name, batch))
    return train, held_out


def add_tokens(
    equations: Sequence[NormalEquations], columns: Tensor, weight: Tensor, dense: Reached, pruned: Reached, mask: Tensor | None
) -> None:
    """Adds one batch: what the output projection has to make up for, against the inputs that it keeps."""
    inputs = pruned[0]
    kept_inputs, kept_weight = inputs[..., columns.to(inputs.device)], weight[:, columns.to(weight.device)]
    # The biases are the same on both sides, so the residual is of the weights and the stream alone.
    residual = dense[0].float() @ weight.T.float() - kept_inputs.float() @ kept_weight.T.float()
    if dense[1] is not None:
        residual += dense[1].float() - pruned[1].float()
    valid = valid_tokens(inputs, mask)
    for one in equations:
        one.add(kept_inputs[valid], residual[valid])


def equations_of(index: int, batches: int, train: NormalEquations, held_out: NormalEquations) -> list[NormalEquations]:
    """Which of the two the batch of this number belongs to; of few batches the last one to both."""
    if batches > 1 and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
        return [held_out]
    return [train, held_out] if batches < HELD_OUT_EVERY and index == batches - 1 else [train]


def resolve(site, keep, old, train, held_out, solver: Solver) -> tuple[Resolved, tuple[Tensor, Tensor | None]]:
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
def weights_in_place(sites: Sequence[AttentionSite], weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    for site in sites:
        set_weight_and_bias(site, weights[site.name])
    yield


def weight_and_bias(site: AttentionSite) -> tuple[Tensor, Tensor | None]:
    """(weight [hidden, features], bias [hidden] or None) of the output projection, detached."""
    module = site.output.module
    weight = module.weight.data
    return (weight.T if is_conv1d(module) else weight), None if module.bias is None else module.bias.data


def set_weight_and_bias(site: AttentionSite, values: tuple[Tensor, Tensor | None]) -> None:
    module, (weight, bias) = site.output.module, values
    module.weight.data = weight.T if is_conv1d(module) else weight
    if bias is not None:
        module.bias.data = bias
