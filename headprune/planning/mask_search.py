"""Post-training mask search of Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, section 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.planning.budget import Budget
from headprune.planning.planner import plan, protected_heads
from headprune.planning.pruning_plan import PruningPlan
from headprune.scoring.block_fisher import mean_outer_product
from headprune.scoring.observations import Need, Observations, SiteObservations
from headprune.scoring.score import score_observations


def fisher_mask_search(
    observed: Observations, budget: Budget, *, min_heads: int = 1, protect: Mapping[str, Iterable[int] | None] | Iterable[str] = ()
) -> PruningPlan:
    """Heads by diagonal Fisher information under `budget`, then rearranged layer by layer by the block Fisher matrix.

    Removing the heads R of a layer is thought to raise the loss by 1/2 sum_{i, j in R} I_ij, I = mean_n g_n g_n^T of its gate
    gradients (eq. 8): heads are swapped, the number kept being fixed, while that falls (their algorithm 2) and the layer costs no
    more of what the budget counts: a swap can bring back a key/value head that had gone.
    Raises InvalidInput where gate gradients were not observed; see `plan` for the rest.
    """
    check_arguments(fisher_mask_search, locals())
    missing = [name for name, site in observed.items() if site.reached and not site.has(Need.GATE_GRADIENT)]
    if missing:
        raise InvalidInput(f"the mask search needs gate_gradient, which was not observed at {missing[0]}.")
    scores = score_observations(observed, "fisher")
    warm = plan(scores, budget, min_heads=min_heads, protect=protect)
    fixed = protected_heads(scores, protect)
    keep = dict(warm.keep)
    for name, site in observed.items():
        if site.reached:
            cost = partial(cost_of, budget, site)
            keep[name] = rearranged(mean_outer_product(site.gate_gradient), warm[name], fixed[name], cost)
    return PruningPlan(keep, dict(warm.shapes), budget, "fisher_mask_search", scores)


def cost_of(budget: Budget, site: SiteObservations, kept: Iterable[int]) -> int:
    return budget.cost(site.shape, site.shape.head_map.keep(kept), site.name)


def rearranged(
    fisher: Tensor, kept: Iterable[int], fixed: Iterable[int] = (), cost: Callable[[list[int]], float] = lambda kept: 0
) -> tuple[int, ...]:
    """The heads to keep, as many as in `kept`, after the swaps that lower the removed heads' block sum; `fixed` stay. cost: heads
    that stay -> what they cost, which no swap may raise above that of `kept`."""
    stays, fixed = sorted(kept), set(fixed)
    limit, diagonal = cost(stays), fisher.diagonal()
    while True:
        removed, free = sorted(set(range(len(fisher))) - set(stays)), [head for head in stays if head not in fixed]
        if not removed or not free:
            break
        pull = fisher[:, removed].sum(dim=1)
        # Change of 1/2 g^T I g when r comes back and s goes: quadratic form of (e_s - e_r).
        change = (
            pull[free][None, :] - pull[removed][:, None]
            + 0.5 * (diagonal[free][None, :] + diagonal[removed][:, None]) - fisher[removed][:, free]
        )  # fmt: skip
        lower = (change.flatten() < -1e-12 * float(diagonal.sum())).nonzero().flatten()
        for best in lower[change.flatten()[lower].argsort(stable=True)].tolist():
            row, column = divmod(best, len(free))
            swapped = sorted({*stays, removed[row]} - {free[column]})
            if cost(swapped) <= limit:
                stays = swapped
                break
        else:
            break
    return tuple(stays)
