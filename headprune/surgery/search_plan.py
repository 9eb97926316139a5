"""Chooses heads by what the pruned model gives once it is compensated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.nn.replace import own_attention
from headprune.planning.budget import Budget
from headprune.planning.layer_weights import LayerSearch, search_layer_weights
from headprune.planning.planner import plan
from headprune.scoring.scores import HeadScores
from headprune.surgery.compensated_error import CompensatedError


def search_plan(
    model: nn.Module,
    scores: HeadScores,
    budget: Budget,
    batches: Iterable[Any],
    *,
    trials: int = 10,
    tokens: int | None = 8_000,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    compensation: str = "least_squares",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> LayerSearch:
    """Finds how many heads each layer is to lose by pruning and compensating on `batches`, again and again; `model` stays as it is.

    Within a layer the lowest scores go. Which layer can spare how many heads is found by `search_layer_weights`, on the error that
    the compensated model has on held-out batches (`CompensatedError`).

    Args:
        batches: calibration batches as for `hp.prune`; forward, token_mask, compensation: as there.
        trials: how many plans are tried at most; each costs up to one forward pass over the batches that are used.
        tokens: use only the first batches up to that many tokens (entries of their first tensor); None: all of them.
        options: of `hp.plan` (allocation, granularity, min_heads, protect, ...).

    Raises InvalidInput where there are no batches, InvalidPlan where the scores are of another model; what `hp.plan` raises.
    """
    plan(scores, budget, **options).check_fits(model)
    chosen = first_batches(batches, tokens)
    with own_attention(model):
        sites = [site for site in attention_sites(model) if site.name not in scores.unreached and site.head_map.query_heads]
        error = CompensatedError(model, sites, chosen, forward=forward, token_mask=token_mask, method=compensation)
        return search_layer_weights(scores, budget, error, trials=trials, seed=seed, progress=progress, **options)


def first_batches(batches: Iterable[Any], tokens: int | None) -> list[Any]:
    """The first batches that together have at least `tokens` entries in their first tensors; at least two where there are two."""
    found: list[Any] = []
    seen = 0
    for batch in batches:
        if tokens is not None and seen >= tokens and len(found) > 1:
            break
        found.append(batch)
        values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else [batch]
        first = next((value for value in values if isinstance(value, Tensor)), None)
        seen += 0 if first is None else first.shape[:2].numel()
    if not found:
        raise InvalidInput("the calibration set is empty; a search needs at least one batch, better two.")
    return found
