"""Post-training mask search of Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, section 4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.planning.budget import Budget
from headprune.planning.planner import plan, protected_heads
from headprune.planning.pruning_plan import PruningPlan
from headprune.scoring.observations import Need, Observations
from headprune.scoring.score import score_observations


def fisher_mask_search(
    observed: Observations, budget: Budget, *, min_heads: int = 1, protect: Mapping[str, Iterable[int] | None] | Iterable[str] = ()
) -> PruningPlan:
    """Heads by diagonal Fisher information under `budget`, then rearranged layer by layer by the block Fisher matrix.

    Removing the heads R of a layer is thought to raise the loss by 1/2 sum_{i, j in R} I_ij, I = mean_n g_n g_n^T of its gate
    gradients (eq. 8): heads are swapped, the number kept being fixed, while that falls (their algorithm 2).
    Raises InvalidInput where gate gradients were not observed; see `plan` for the rest.
    """
    missing = [name for name, site in observed.items() if site.reached and not site.has(Need.GATE_GRADIENT)]
    if missing:
        raise InvalidInput(f"the mask search needs gate_gradient, which was not observed at {missing[0]}.")
    scores = score_observations(observed, "fisher")
    warm = plan(scores, budget, min_heads=min_heads, protect=protect)
    fixed = protected_heads(scores, protect)
    keep = dict(warm.keep)
    for name, site in observed.items():
        if site.reached:
            keep[name] = rearranged(block_fisher(site.gate_gradient), warm[name], fixed[name])
    return PruningPlan(keep, dict(warm.shapes), budget, "fisher_mask_search", scores)


def block_fisher(gate_gradient: Tensor) -> Tensor:
    """[samples, heads] -> [heads, heads], fp64: mean of g g^T."""
    rows = gate_gradient.double()
    return rows.T @ rows / max(len(rows), 1)


def rearranged(fisher: Tensor, kept: Iterable[int], fixed: Iterable[int] = ()) -> tuple[int, ...]:
    """The heads to keep, as many as in `kept`, after the swaps that lower the removed heads' block sum; `fixed` stay."""
    gone = torch.ones(len(fisher), dtype=torch.float64)
    gone[list(kept)] = 0.0
    while True:
        removed, stays = gone.nonzero().flatten(), [h for h in (gone == 0).nonzero().flatten().tolist() if h not in set(fixed)]
        if not len(removed) or not stays:
            break
        pull = fisher @ gone
        # Change of 1/2 g^T I g when r comes back and s goes: quadratic form of (e_s - e_r).
        diagonal = fisher.diagonal()
        change = (
            pull[stays][None, :] - pull[removed][:, None]
            + 0.5 * (diagonal[stays][None, :] + diagonal[removed][:, None]) - fisher[removed][:, stays]
        )  # fmt: skip
        best = int(change.argmin())
        row, column = divmod(best, len(stays))
        if change[row, column] >= -1e-12 * float(diagonal.sum()):
            break
        gone[removed[row]], gone[stays[column]] = 0.0, 1.0
    return tuple((gone == 0).nonzero().flatten().tolist())
