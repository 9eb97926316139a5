"""How far pruned models are from the dense one once they are compensated: for many plans, none of which is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models.site import AttentionSite
from headprune.scoring.passes import pass_of
from headprune.surgery.compensate import HELD_OUT_EVERY, Passes, Target, is_held_out, resolve, sample_weights
from headprune.surgery.normal_equations import NormalEquations, get_solver
from headprune.surgery.parts import Weights, keep_by_output
from headprune.surgery.readout import distances, readout
from headprune.surgery.walk import Walk

Heads = tuple[int, ...]


@dataclass(frozen=True)
class Stand:
    """The pruned model up to the output projection of one site: a walk for each piece of a batch, the normal equations there of
    all heads (for the whole output, not for what old weights leave), and the weights of the sites before."""

    walks: list[Walk]
    train: NormalEquations
    held_out: NormalEquations
    solved: dict[str, Weights]


class CompensatedError:
    """Plans -> one number each, lower is better: how far the pruned, compensated model is from the dense one on held-out batches.

    The distance is of the model's output: mean KL divergence of its logits, or the relative squared error of its first output
    (states, embeddings); over tokens that count, each sample alike. Each `held_out_every`th batch (of fewer the last) is held out,
    and all of a single one is measured; layers are re-solved as `resolve_outputs` does it. Plans with the same heads in their first
    layers share what is run there.
    Keeps what the dense model has at every site in memory, so give it few batches. Use it inside `own_attention(model)`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        batches: Iterable[Any],
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        token_mask: Callable[[Any], Tensor | None] | None = None,
        method: str = "least_squares",
        held_out_every: int = HELD_OUT_EVERY,
    ) -> None:
        self.solver, self._every, self._sites = get_solver(method), held_out_every, sites
        self._known: dict[tuple[Heads, ...], float] = {}
        self._path: list[tuple[Heads, Stand]] = []
        with pass_of(model), torch.no_grad():
            self.passes = Passes.of(model, sites, batches, forward, token_mask)
            count = self.passes.pieces[-1].of + 1
            held_out = [is_held_out(piece.of, count, held_out_every) for piece in self.passes.pieces]
            self._held_out = [index for index, held in enumerate(held_out) if held]
            self._targets, self._outputs = self._dense()

    def __call__(self, plans: Sequence[Mapping[str, Sequence[int]]]) -> list[float]:
        """One error for each plan (site name -> heads to keep)."""
        keeps = [keep_by_output(self._sites, plan) for plan in plans]
        wanted = [tuple(tuple(keep[site.name]) for site in self.passes.sites) for keep in keeps]
        with pass_of(self.passes.model), torch.no_grad():
            self._known |= {keep: self._error(keep) for keep in sorted(set(wanted) - set(self._known))}
        return [self._known[keep] for keep in wanted]

    def _dense(self) -> tuple[list[list[list[Target]]], dict[int, tuple[Tensor, bool]]]:
        """[sites][pieces][calls] of targets, and the output for each held-out piece."""
        walks = self.passes.walks()
        targets = [[self.passes.targets(site, walk) for walk in walks] for site in self.passes.sites]
        return targets, {index: readout(walks[index].end()) for index in self._held_out}

    def _error(self, keep: tuple[Heads, ...]) -> float:
        shared = next((at for at, (heads, _) in enumerate(self._path) if heads != keep[at]), len(self._path))
        shared = min(shared, max(len(self._path) - 1, 0))  # behind the last stand there may be nothing: a call that was broken off
        # The stand at a site depends on the heads of those before it alone.
        stand = self._path[shared][1] if shared < len(self._path) else self._stand(None, {}, {}, 0)
        del self._path[shared:]
        sites = self.passes.sites
        for at in range(shared, len(sites)):
            self._path.append((keep[at], stand))
            kept = {site.name: heads for site, heads in zip(sites, keep[: at + 1])}
            solved = {**stand.solved, sites[at].name: self._solved(sites[at], kept, stand)}
            if at + 1 < len(sites):
                stand = self._stand(stand, kept, solved, at + 1)
        return self._distance(stand, kept, solved)

    def _stand(self, before: Stand | None, kept: Mapping[str, Heads], solved: dict[str, Weights], at: int) -> Stand:
        site, passes = self.passes.sites[at], self.passes
        walks = [walk.copy() for walk in before.walks] if before else passes.walks()
        weight, _ = passes.dense[site.name]
        train, held_out = (NormalEquations.empty(weight.shape[1], weight.shape[0]) for _ in range(2))
        for index, walk in enumerate(walks):
            with passes.pruned(kept, solved):
                calls = passes.reached(site, walk)
            for target, (inputs, stream) in zip(self._targets[at][index], calls, strict=True):
                shares = passes.shares(index, passes.valid(site, index, inputs), self._every)
                for equations, tokens in zip((train, held_out), shares):
                    equations.add(inputs[tokens], target.missing(stream)[tokens], sample_weights(tokens))
        return Stand(walks, train, held_out, solved)

    def _solved(self, site: AttentionSite, kept: Mapping[str, Heads], stand: Stand) -> Weights:
        old, columns = self.passes.dense[site.name], site.columns(kept[site.name])
        if all(len(heads) == self._whole(name) for name, heads in kept.items()):
            return old  # nothing has gone so far
        weight = old[0][:, columns.to(old[0].device)]
        train, held_out = (equations.about(columns, weight) for equations in (stand.train, stand.held_out))
        return resolve(site, kept[site.name], old, train, held_out, self.solver, join=False)[1]

    def _whole(self, name: str) -> int:
        return next(site.head_map.query_heads for site in self.passes.sites if site.name == name)

    def _distance(self, stand: Stand, kept: Mapping[str, Heads], solved: dict[str, Weights]) -> float:
        last = self.passes.sites[-1].name
        total, samples = 0.0, 0
        for index, (dense, is_logits) in self._outputs.items():
            with self.passes.pruned(kept, solved):
                found, _ = readout(stand.walks[index].copy().end())
            rows = distances(dense, found, is_logits, self.passes.masks(last, self.passes.pieces[index].batch))
            total, samples = total + float(rows.double().sum()), samples + len(rows)
        return total / samples
