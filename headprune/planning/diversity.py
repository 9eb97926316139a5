"""Greedy removal with diversity: of heads that do the same, one stays."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.scoring.activations import head_similarity
from headprune.scoring.observations import Need, Observations
from headprune.scoring.scores import HeadScores

STEP = 1e-6  # by which a score at least exceeds that of the head before it


def diverse(scores: HeadScores, observed: Observations, strength: float = 1.0) -> HeadScores:
    """`scores` as a greedy removal sees them that counts a head less while another that stays gives the same.

    Head h of a layer costs s_h (1 - strength * max over the other kept heads j of CKA(h, j)); the cheapest goes, and the rest is
    counted anew, so that a twin of a head that has gone is worth its whole score (maximal marginal relevance, Carbonell &
    Goldstein 1998, turned to removal). Any allocation of `plan` takes the result.

    Args:
        observed: with Need.GRAM, of the same model.
        strength: 0 leaves the scores as they are, but for their rising order; 1 lets a perfect copy go for nothing.

    Raises InvalidInput for negative scores, a strength outside [0, 1], or where the Gram matrices were not observed.
    """
    check_arguments(diverse, locals())
    if not 0 <= strength <= 1:
        raise InvalidInput(f"strength is {strength}; expected 0 (scores alone) to 1 (a perfect copy goes for nothing).")
    found = {}
    for name, own in scores.items():
        site = observed.sites.get(name)
        if name in scores.unreached:
            found[name] = own
            continue
        if site is None or not site.has(Need.GRAM):
            raise InvalidInput(f"diversity needs the Gram matrix of {name}: observe Need.GRAM on the same model.")
        if bool((own < 0).any()):
            raise InvalidInput(f"{scores.criterion} gives negative scores at {name}; diversity weighs scores that are at least 0.")
        found[name] = removal_prices(own, head_similarity(site), strength)
    return replace(scores, criterion=f"{scores.criterion}, diverse", scores=found, spread=None)


def removal_prices(scores: Tensor, similarity: Tensor, strength: float) -> Tensor:
    """[heads], [heads, heads] -> [heads]: what each head cost when it went, made to rise along that order."""
    likeness = similarity.clone().float().fill_diagonal_(0.0)
    prices, left, last = torch.zeros_like(scores), list(range(len(scores))), 0.0
    while left:
        costs = scores[left] * (1 - strength * likeness[left][:, left].amax(dim=1))
        cheapest = int(costs.argmin())
        last = max(float(costs[cheapest]), last * (1 + STEP))
        prices[left.pop(cheapest)] = last
    return prices
