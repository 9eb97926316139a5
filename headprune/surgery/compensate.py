"""Re-solves output projections after heads are removed, so that each layer gives again what the dense layer gave.

Layer by layer, in order: X are the inputs that the already pruned model really gives to the layer's output projection
(kept heads only), S the residual stream that it adds the result to, Y_0 and S_0 what the dense model's projection and
stream were for the same tokens; W, b minimise ||S + X W^T + b - S_0 - Y_0||^2 + lambda ||W - W_0||^2 (least squares, ridge
towards the old weights; each sample counts alike, whatever its length). So each layer also takes back what the layers
before it left wrong in the stream. Where a site adds to no stream that can be seen, S - S_0 counts as 0. A layer that runs several
times in one pass (shared weights) is solved over all of its calls. No gradient, no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.batches import by_name, several
from headprune.models.feed_forward import feed_forwards
from headprune.models.gating import output_input_hook
from headprune.models.site import AttentionSite
from headprune.models.stream import residual_streams
from headprune.models.tokens import TokenMask, token_masks, valid_tokens
from headprune.scoring.passes import pass_of
from headprune.surgery.normal_equations import Layer, NormalEquations, Solver, get_solver
from headprune.surgery.parts import (
    Part,
    Weights,
    columns_of,
    from_first_loss,
    in_order_of_pass,
    keep_by_output,
    masked_to,
    owner_of,
    parts_of,
    set_weight_and_bias,
    weight_and_bias,
    weights_in_place,
)
from headprune.surgery.pieces import Piece, pieces_of
from headprune.surgery.walk import Keeping, Walk, keeping_for

Keep = Mapping[str, Sequence[int]]  # site name -> the query heads that stay
Reached = tuple[Tensor, Tensor | None]  # the input of a linear layer, and the stream that its result is added to
TYPICAL_LENGTH = 64.0  # tokens; a constant, which only keeps the sums of usual batches near sums over tokens
FEED_FORWARD_TOKENS = 2  # as many tokens for each input, at least
HELD_OUT_EVERY = 5  # each fifth batch (of fewer the last) chooses the ridge and guards against a re-solve that does not help


@dataclass(frozen=True)
class Resolved:
    """What became of one site, or of the end of a feed-forward (by its own name): relative squared error of the stream behind it on
    held-out batches, before and after. ridge: of the re-solve, as a share of the mean diagonal of the Gram matrix; None where it
    did not lower the held-out error and was not applied."""

    site: str
    error_before: float
    error_after: float
    ridge: float | None


def resolve_outputs(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    keep: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    method: str = "least_squares",
    feed_forward: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resolved]:
    """Re-solves the output projections of the sites in `keep`, from the first that loses heads on, before the cut, in place.

    Afterwards the projections are those of the pruned model: with the other heads gated or cut they reproduce the dense
    outputs as well as least squares can.

    Args:
        batches: calibration batches, a list or anything that can be read more than once.
        forward: runs the model on a batch; default `model(**batch)`.
        token_mask: bool [batch, tokens] of the tokens that count; default as in headprune.models.tokens.token_masks.
        method: "least_squares", "mask_tuning" (one factor for each head) or "bias" (headprune.surgery.normal_equations).
        feed_forward: re-solve also the linear layer that ends the feed-forward behind each of them, where there are twice as many
            tokens as it has inputs, by least squares: Gram matrices of all its inputs.
        progress: called with (layers done, layers).
    """
    solver, keep = get_solver(method), keep_by_output(sites, keep)
    reports: list[Resolved] = []
    with pass_of(model), torch.no_grad():
        passes = Passes.of(model, sites, batches, forward, token_mask, keep, feed_forward)
        solved: dict[str, Weights] = dict(passes.dense)
        walks = list(zip(passes.walks(), passes.walks()))
        for done, part in enumerate(passes.parts):
            train, held_out = gather(passes, part, keep, solved, walks)
            report, solved[part.name] = resolve(part, keep.get(part.name), passes.dense[part.name], train, held_out, solver)
            reports.append(report)
            if progress:
                progress(done + 1, len(passes.parts))
    for part in passes.parts:
        set_weight_and_bias(part, solved[part.name])
    return reports


def gather(
    passes: Passes, part: Part, keep: Keep, solved: Mapping[str, Weights], walks: Sequence[tuple[Walk, Walk]]
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of `part`: the dense model's stream behind it against the inputs that the model pruned so far gives."""
    weight, _ = passes.dense[part.name]
    columns = columns_of(part, keep, weight)
    kept_weight = weight[:, columns.to(weight.device)]
    before = {name: keep[name] for name in passes.names_before(part) if name in keep}
    train, held_out = (NormalEquations.empty(len(columns), weight.shape[0]) for _ in range(2))
    for index, (dense_walk, pruned_walk) in enumerate(walks):
        targets = passes.targets(part, dense_walk)
        with passes.pruned(before, solved):
            calls = passes.reached(part, pruned_walk)
        for target, reached in zip(targets, calls, strict=True):
            shares = passes.shares(index, passes.valid(part, index, reached[0]))
            add_tokens(zip((train, held_out), shares), columns, kept_weight, target, reached)
    return train, held_out


def add_tokens(
    sums: Iterable[tuple[NormalEquations, Tensor]], columns: Tensor, kept_weight: Tensor, target: Target, reached: Reached
) -> None:
    """Adds one batch to `sums`, to each the tokens that it is given with: what the kept columns leave of `target`, against their
    inputs in the pruned model."""
    inputs, stream = reached
    kept_inputs = inputs[..., columns.to(inputs.device)]
    residual = target.missing(stream) - kept_inputs.float() @ kept_weight.T.float()
    for equations, tokens in sums:
        equations.add(kept_inputs[tokens], residual[tokens], sample_weights(tokens))


def sample_weights(valid: Tensor) -> Tensor:
    """[valid tokens] of valid [batch, tokens] or [batch, rows, columns]: every sample counts alike, however long it is; of packed
    pictures, [tokens], every token."""
    if valid.dim() == 1:
        return torch.ones(int(valid.sum()), device=valid.device)
    counts = valid.flatten(1).sum(dim=1).clamp(min=1)
    return (TYPICAL_LENGTH / counts).view(-1, *[1] * (valid.dim() - 1)).expand(valid.shape)[valid]


def shares_of(
    valid: Tensor, index: int, batches: int, every: int = HELD_OUT_EVERY, rows: Tensor | None = None, samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Those of the `valid` tokens [samples, tokens] of the batch `index` that are learnt from, and those that are held out: of
    several batches all or none, of a single one those of some samples.

    rows, samples: which samples of how many in the batch these are, by default all.
    """
    count = len(valid) if samples is None else samples
    if batches > 1:
        held_out = torch.tensor(is_held_out(index, batches, every))
    elif count > 1 and valid.dim() > 1:
        numbers = range(len(valid)) if rows is None or len(rows) != len(valid) else rows.tolist()
        held_out = torch.tensor([is_held_out(number, count, every) for number in numbers])
    else:  # one sample, or packed ones
        return valid, torch.zeros_like(valid)
    held_out = held_out.to(valid.device).view(-1, *[1] * (valid.dim() - 1))
    return valid & ~held_out, valid & held_out


def is_held_out(index: int, count: int, every: int = HELD_OUT_EVERY) -> bool:
    """Whether one of `count` batches, or samples, is: of few the last."""
    return index % every == every - 1 if count >= every else index == count - 1


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
        return self.projected if stream is None or self.stream is None else self.projected + (self.stream - stream.float())


@dataclass(frozen=True)
class Passes:
    """What all forward passes of a compensation share. parts: what is re-solved, in the order of the pass; sites: the attentions
    among them; pieces: what runs of the batches, in their order; dense: the parts' weights and biases; streams: the module that
    receives the stream which a part adds to; repeated: the names of parts that run several times in one pass."""

    model: nn.Module
    parts: tuple[Part, ...]
    sites: tuple[AttentionSite, ...]
    pieces: Sequence[Piece]
    forward: Callable[[nn.Module, Any], Any]
    masks: Callable[[str, Any], Tensor | None]
    dense: Mapping[str, Weights]
    streams: Mapping[str, nn.Module]
    keeping: Keeping
    repeated: frozenset[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] | None,
        token_mask: TokenMask | None,
        keep: Keep | None = None,
        feed_forward: bool = False,
    ) -> Passes:
        """keep: where heads go (`keep_by_output`); only from there on, and only what it names, is to be re-solved. Raises
        InvalidInput where there are no batches."""
        batches = list(several(batches))
        if not batches:
            raise InvalidInput("the calibration set is empty; compensation needs at least one batch.")
        runs: Callable[[nn.Module, Any], Any] = forward or partial(by_name, instead="forward")

        def run() -> Any:
            return runs(model, batches[0])

        sites, repeated = in_order_of_pass([part for site in sites for part in site.by_output()], run)
        if keep is not None:
            sites = from_first_loss(sites, keep)
        behind = feed_forwards(model, sites, run) if feed_forward else {}
        parts = parts_of(sites, behind)
        repeated |= {behind[name].name for name in repeated & behind.keys()}
        dense = {part.name: weight_and_bias(part) for part in parts}
        streams = residual_streams(model, sites, run) | {part.name: part.stream for part in behind.values()}
        masks = token_masks(model, token_mask)
        keeping = keeping_for(model, run, parts)
        pieces = pieces_of(batches, partial(runs, model), parts, masks)
        return cls(model, tuple(parts), tuple(sites), pieces, runs, masks, dense, streams, keeping, frozenset(repeated))

    def walks(self) -> list[Walk]:
        """A pass of each piece, before its first step."""
        return [Walk(self.model, partial(self.forward, self.model, piece.batch), self.keeping) for piece in self.pieces]

    def shares(self, index: int, valid: Tensor, every: int = HELD_OUT_EVERY) -> tuple[Tensor, Tensor]:
        """`shares_of` of the piece `index`."""
        piece = self.pieces[index]
        samples = sum(len(one.rows) for one in self.pieces if one.rows is not None) or None
        return shares_of(valid, piece.of, self.pieces[-1].of + 1, every, piece.rows, samples)

    def names_before(self, part: Part) -> list[str]:
        """The parts that are re-solved before this one."""
        names = [one.name for one in self.parts]
        return names[: names.index(part.name)]

    def reached(self, part: Part, walk: Walk) -> list[Reached]:
        """What each call of `part` gets; they are re-solved together. What the stream lacks is taken back once, at the first call:
        one change of the weights acts at every call, and would take it back as often."""
        stream = self.streams.get(part.name)
        if part.name not in self.repeated:
            return [walk.to(part, stream)]
        first, *later = walk.every(part, stream)
        return [first, *((inputs, None) for inputs, _ in later)]

    def targets(self, part: Part, walk: Walk) -> list[Target]:
        """What the dense model has behind each call of `part`."""
        return [Target.of(reached, self.dense[part.name][0]) for reached in self.reached(part, walk)]

    @contextmanager
    def pruned(self, keep: Mapping[str, Sequence[int]], solved: Mapping[str, Weights]) -> Iterator[None]:
        """Inside the block the model has the weights `solved`, and at the sites in `keep` the other heads are off."""
        with weights_in_place([part for part in self.parts if part.name in solved], solved), ExitStack() as stack:
            for site in self.sites:
                if site.name in keep:
                    stack.enter_context(output_input_hook(site, masked_to(site, keep[site.name])))
            yield

    def valid(self, part: Part, index: int, states: Tensor) -> Tensor:
        """bool [samples, tokens]: the tokens of the piece `index` that count."""
        return valid_tokens(states, self.masks(part.name, self.pieces[index].batch))


def resolve(
    part: Part,
    keep: Sequence[int] | None,
    old: Weights,
    train: NormalEquations,
    held_out: NormalEquations,
    solver: Solver,
    join: bool = True,
) -> tuple[Resolved, Weights]:
    """The change that leaves the smallest held-out error, and the weights that it gives; the old ones where none helps.

    keep: the heads that stay, None for a feed-forward. join: what the held-out batches have chosen is solved once more with
    them. Raises InvalidInput for too few tokens; a feed-forward, and an attention that loses no head, then stay as they are.
    """
    weight, bias = old
    columns = columns_of(part, {} if keep is None else {part.name: keep}, weight).to(weight.device)
    layer = Layer(weight[:, columns], owner_of(part, columns), bias is not None)
    whole = train + held_out
    if not train.tokens or not held_out.tokens:  # a single sample, packed ones, or a batch without a token that counts
        train = held_out = whole
    if keep is None:
        solver = get_solver("least_squares")
        if whole.tokens < FEED_FORWARD_TOKENS * solver.unknowns(layer):
            return Resolved(part.name, 1.0, 1.0, None), old
    if len(columns) == weight.shape[1] and whole.tokens < solver.unknowns(layer):  # as of a pool over patches, one a picture
        return Resolved(part.name, 1.0, 1.0, None), old
    refuse_too_few(part.name, whole.tokens, solver.unknowns(layer))
    whole.refuse_infinite()
    before = held_out.error(torch.zeros_like(held_out.cross))
    best, last = before, math.inf
    ridge: float | None = None
    change: Tensor | None = None
    for candidate, solution in solver.solve(train, layer, solver.settings):
        error = held_out.error(solution)
        if error < best:
            best, ridge, change = error, candidate, solution
        if error > last:
            break
        last = error
    scale = max(before, torch.finfo(torch.float64).tiny)
    report = Resolved(part.name, 1.0 if before else 0.0, best / scale, ridge)
    if change is None or ridge is None:
        return report, old
    if join:
        change = dict(solver.solve(whole, layer, (ridge,))).get(ridge, change)
    new_weight = weight.clone()
    new_weight[:, columns] += change[:-1].T.to(weight)
    new_bias = None if bias is None else bias + change[-1].to(bias)
    return report, (new_weight, new_bias)


def refuse_uncompensated(calibration: Iterable[Any] | None, feed_forward: bool) -> None:
    """InvalidInput where feed-forwards are to be re-solved on nothing."""
    if feed_forward and calibration is None:
        raise InvalidInput("feed_forward=True re-solves feed-forwards on calibration batches; give calibration= too.")


def refuse_too_few(name: str, tokens: int, needed: int) -> None:
    if tokens < needed:
        raise InvalidInput(
            f"compensation has {tokens} calibration tokens at {name}; its {needed} unknowns need at least {needed}, better "
            f"{10 * needed}. Give more calibration batches, or compensation='mask_tuning' or 'bias'."
        )
