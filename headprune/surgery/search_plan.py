"""Chooses heads by what the pruned model gives once it is compensated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from headprune.arguments import check_arguments, check_options, keywords
from headprune.errors import InvalidInput, whole_number
from headprune.models import attention_sites
from headprune.models.batches import several
from headprune.models.padding import as_given
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention
from headprune.planning.budget import Budget
from headprune.planning.layer_weights import LayerSearch, search_layer_weights
from headprune.planning.planner import plan
from headprune.scoring.scores import HeadScores
from headprune.surgery.compensate import HELD_OUT_EVERY
from headprune.surgery.compensated_error import CompensatedError

FEW_BATCHES = 4  # of fewer, the one that is held out is a large part of what could be learnt
FEW_HELD_OUT_EVERY = 3
THINNED_TOKENS = 1.5  # times as many tokens: with 36 held-out texts the choice at half of MiniLM's heads was noise


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
        batches: calibration batches as for `hp.prune`; token_mask, compensation: as there.
        forward: runs the model on a batch; what it returns is compared. Where an embedding or logits of the model's states are
            used, let it return those ([samples, features]): other heads matter to them than to the states of all tokens.
        trials: how many plans are tried at most; each costs up to one forward pass over the batches that are used.
        tokens: use only about so many tokens (entries of the batches' first tensor): the first batches, or where those would be
            fewer than four, every k-th sample of all; None: all of them.
        options: of `hp.plan` (allocation, granularity, min_heads, protect, ...).

    Raises InvalidInput where there are no batches, InvalidPlan where the scores are of another model; what `hp.plan` raises.
    """
    model = plain_module(model)
    check_arguments(search_plan, locals())
    check_options("search_plan", options, keywords(plan, search_plan))
    whole_number("trials", trials)
    if tokens is not None:
        whole_number("tokens", tokens)
    plan(scores, budget, **options).check_fits(model)
    chosen, every = search_batches(batches, tokens)
    with own_attention(model):
        sites = [site for site in attention_sites(model) if site.name not in scores.unreached and site.head_map.query_heads]
        error = CompensatedError(
            model, sites, chosen, forward=forward, token_mask=token_mask, method=compensation, held_out_every=every
        )
        return search_layer_weights(scores, budget, error, trials=trials, seed=seed, progress=progress, **options)


def search_batches(batches: Iterable[Any], tokens: int | None) -> tuple[list[Any], int]:
    """What a search reads of `batches`, and how many batches there are to each held-out one.

    Of two or three large batches half or a third would be held out, all of it of one batch. So then every batch gives some of its
    samples, and a third of the batches is held out, which leaves enough samples to tell plans apart.
    """
    given = list(several(batches))
    first = first_batches(given, tokens)
    if tokens is None or len(first) >= FEW_BATCHES or len(first) == len(given):
        return first, HELD_OUT_EVERY
    k = math.ceil(sum(map(entries, given)) / (THINNED_TOKENS * max(tokens, 1)))
    thinned = every_kth_sample(given, max(k, 1))
    return (first, HELD_OUT_EVERY) if thinned is None or len(thinned) < FEW_HELD_OUT_EVERY else (thinned, FEW_HELD_OUT_EVERY)


def every_kth_sample(batches: Sequence[Any], k: int) -> list[Any] | None:
    """Every k-th sample of all batches, by the batches that they are in; None unless those are mappings to tensors that have one
    entry for each sample."""
    found: list[Any] = []
    seen = 0
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) and value.dim() for value in batch.values()):
            return None
        counts = {len(value) for value in batch.values()}
        if len(counts) != 1:
            return None
        count = counts.pop()
        if -seen % k < count:
            found.append(as_given(batch, {name: value[-seen % k :: k] for name, value in batch.items()}))
        seen += count
    return found


def entries(batch: Any) -> int:
    """Tokens of a batch: entries of its first tensor, [samples, tokens]."""
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else [batch]
    first = next((value for value in values if isinstance(value, Tensor)), None)
    return 0 if first is None else first.shape[:2].numel()


def first_batches(batches: Iterable[Any], tokens: int | None) -> list[Any]:
    """The first batches that together have at least `tokens` entries in their first tensors; at least two where there are two."""
    found: list[Any] = []
    seen = 0
    for batch in batches:
        if tokens is not None and seen >= tokens and len(found) > 1:
            break
        found.append(batch)
        seen += entries(batch)
    if not found:
        raise InvalidInput("the calibration set is empty; a search needs at least one batch, better two.")
    return found
