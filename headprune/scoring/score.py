"""From observations to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from headprune.arguments import check_arguments, check_options, keywords
from headprune.errors import InvalidInput, unknown_name
from headprune.models.identity import ModelIdentity
from headprune.scoring.criterion import get_criterion
from headprune.scoring.observations import Observations
from headprune.scoring.observe import observe
from headprune.scoring.scores import HeadScores
from headprune.scoring.stability import spread_of

NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "layer_l2": lambda scores: scores / scores.norm().clamp(min=torch.finfo(torch.float32).tiny),
    "layer_sum": lambda scores: scores / scores.abs().sum().clamp(min=torch.finfo(torch.float32).tiny),
}


def check_normalization(name: str) -> None:
    """InvalidInput unless `hp.score(..., normalize=name)` can be."""
    if name not in NORMALIZATIONS:
        raise unknown_name("normalization", name, NORMALIZATIONS)


def score_observations(observed: Observations, criterion: str, normalize: str = "none") -> HeadScores:
    """The scores that `criterion` gives to what was observed.

    normalize: "none", "layer_l2" (Michel et al. divide each layer's scores by their L2 norm) or "layer_sum".
    Raises InvalidInput for an unknown name, or where the criterion needs what was not observed.
    """
    check_arguments(score_observations, locals())
    chosen = get_criterion(criterion)
    check_normalization(normalize)
    reached = Observations({name: site for name, site in observed.items() if site.reached}, observed.seen)
    by_layer = NORMALIZATIONS[normalize]
    normalized = replace(chosen, whole_model=True, function=lambda some: {k: by_layer(v) for k, v in chosen.scores(some).items()})
    found = normalized.scores(reached)
    nothing = {name: torch.full((site.shape.head_map.query_heads,), torch.nan) for name, site in observed.items()}
    label = criterion if normalize == "none" else f"{criterion}/{normalize}"
    return HeadScores(
        label,
        {**nothing, **found},
        {name: site.shape for name, site in observed.items()},
        spread_of(reached, normalized, nothing),
        frozenset(observed) - frozenset(reached),
    )


@overload
def score(
    model: nn.Module, batches: Any = (), criterion: str = "fisher", *, normalize: str = "none", **options: Any
) -> HeadScores: ...


@overload
def score(
    model: nn.Module, batches: Any = (), criterion: list[str] | tuple[str, ...] = ..., *, normalize: str = "none", **options: Any
) -> dict[str, HeadScores]: ...


def score(
    model: nn.Module, batches: Any = (), criterion: str | Iterable[str] = "fisher", *, normalize: str = "none", **options: Any
) -> HeadScores | dict[str, HeadScores]:
    """Scores every query head of `model` on `batches`; options are those of `observe` (loss_fn, token_mask, ...).

    criterion: one name, or several: everything is measured in one pass and a dict of HeadScores comes back.
    Raises InvalidInput for an unknown criterion, an empty calibration set, a loss that is missing or not finite.
    """
    names = [criterion] if isinstance(criterion, str) else list(criterion) if isinstance(criterion, Iterable) else []
    if not names:
        raise InvalidInput(f"criterion is {criterion!r:.80}; expected the name of one or a list of names; hp.criteria() has them.")
    check_arguments(score, locals())
    check_normalization(normalize)
    check_options("score", options, keywords(observe, score))
    needs = frozenset().union(*(get_criterion(name).needs for name in names))
    observed = observe(model, batches, needs, **options)
    made_for = ModelIdentity.of(model)
    scores = {name: replace(score_observations(observed, name, normalize), made_for=made_for) for name in names}
    return scores[criterion] if isinstance(criterion, str) else scores
