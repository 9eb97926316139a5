"""Whether there were enough calibration samples to tell the heads apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.scoring.agreement import agreement
from headprune.scoring.criterion import Criterion, get_criterion
from headprune.scoring.observations import MERGES, Observations, SiteObservations, fields_of
from headprune.scoring.scores import HeadScores

RESAMPLES = 50
MOST_AT_ONCE = 2**24  # numbers that are drawn at once, 64 MB
DOUBT = 1.645  # standard deviations: a head this near to the cut would fall on its other side in 1 of 20 other samples


@dataclass(frozen=True)
class Stability:
    """How alike the rankings from different draws of calibration data are: mean Spearman correlation and mean overlap of
    the heads kept, over pairs of rankings; unsettled: site -> heads that some draws keep and others remove."""

    spearman: float
    overlap: float
    keep: float
    unsettled: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        count = sum(len(heads) for heads in self.unsettled.values())
        return f"Spearman {self.spearman:.3f}, {self.overlap:.0%} of the best {self.keep:.0%} the same, {count} heads unsettled"


def ranking_stability(
    observed: Observations | Sequence[Observations], criterion: str, keep: float = 0.5, resamples: int = RESAMPLES
) -> Stability:
    """How stable a criterion's ranking is across calibration data.

    observed: observations of several disjoint draws of data (data seeds), or one set, whose samples are then drawn again
    with replacement `resamples` times (bootstrap, Efron 1979). Attentions that no data ran through are left out.
    Raises InvalidInput where one set is given and the criterion reads sums over samples, which cannot be drawn again.
    """
    check_arguments(ranking_stability, locals())
    chosen = get_criterion(criterion)
    whole_number("resamples", resamples, least=2)
    if not 0 < keep <= 1:
        raise InvalidInput(f"keep is {keep}; expected the fraction of the heads that stay, above 0 and up to 1.")
    if isinstance(observed, Observations):
        (observed,) = of_reached([observed])
        chosen.check_observed(observed)
        if not can_resample(chosen):
            raise InvalidInput(
                f"{criterion} reads sums over all samples, which cannot be drawn again; observe several parts of the data "
                "and give them as a list."
            )
        rankings = bootstrap(observed, chosen, resamples)
    else:
        rankings = [chosen.scores(part) for part in of_reached(observed)]
    if len(rankings) < 2:
        raise InvalidInput("stability compares rankings; give at least two draws of data.")
    pairs = [agreement(rankings[i], rankings[j], keep) for i, j in combinations(range(min(len(rankings), 20)), 2)]
    return Stability(fmean(pair.spearman for pair in pairs), fmean(pair.overlap for pair in pairs), keep, between(rankings, keep))


def of_reached(draws: Sequence[Observations]) -> list[Observations]:
    """Each draw without the sites that one of them did not run through, or that have no heads left: they have no ranking."""
    left_out = {name for draw in draws for name, site in draw.items() if not site.reached}
    return [Observations({name: site for name, site in draw.items() if name not in left_out}, draw.seen) for draw in draws]


def between(rankings: Sequence[Mapping[str, Tensor]], keep: float) -> dict[str, tuple[int, ...]]:
    """The heads that between 5 % and 95 % of the rankings keep."""
    everything = torch.stack([torch.cat(list(ranking.values())) for ranking in rankings])
    count = max(1, round(keep * everything.shape[1]))
    kept = torch.zeros_like(everything).scatter_(1, everything.topk(count, dim=1).indices, 1.0).mean(dim=0)
    parts = kept.split([len(scores) for scores in rankings[0].values()])
    found = {name: ((part > 0.05) & (part < 0.95)).nonzero().flatten() for name, part in zip(rankings[0], parts)}
    return {name: tuple(heads.tolist()) for name, heads in found.items() if len(heads)}


def can_resample(chosen: Criterion) -> bool:
    """Whether all that the criterion reads is kept sample by sample (or does not depend on the data at all)."""
    merges = {MERGES[name] for need in chosen.needs for name in fields_of(need)}
    return "samples" in merges and merges <= {"samples", "same"}


def bootstrap(observed: Observations, chosen: Criterion, resamples: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """The scores from `resamples` draws of the samples with replacement; one draw is the same for all sites.

    All draws are scored at once (torch.vmap); one after another where the criterion cannot be mapped, because it looks at
    values (third parties may).
    """
    rows = {name: sample_rows(site, chosen) for name, site in observed.items()}
    counts = sorted({len(values) for fields in rows.values() for values in fields.values()})
    generator = torch.Generator().manual_seed(seed)
    draws = {count: torch.randint(count, (resamples, count), generator=generator) for count in counts}

    def scores(drawn: dict[int, Tensor]) -> dict[str, Tensor]:
        sites: dict[str, SiteObservations] = {}
        for name, site in observed.items():
            values: dict[str, Any] = {field: rows_of[drawn[len(rows_of)]] for field, rows_of in rows[name].items()}
            sites[name] = replace(site, **values)
        return chosen.scores(Observations(sites))

    size = sum(values.numel() for fields in rows.values() for values in fields.values())
    try:
        found = torch.vmap(scores, chunk_size=max(1, min(resamples, MOST_AT_ONCE // max(size, 1))))(draws)
    except RuntimeError:
        return [scores({count: index[number] for count, index in draws.items()}) for number in range(resamples)]
    return [{name: values[number] for name, values in found.items()} for number in range(resamples)]


def sample_rows(site: SiteObservations, chosen: Criterion) -> dict[str, Tensor]:
    """What the criterion reads that is kept sample by sample, by field."""
    names = [name for need in chosen.needs for name in fields_of(need) if MERGES[name] == "samples"]
    found = {name: getattr(site, name) for name in names}
    return {name: rows for name, rows in found.items() if rows is not None and len(rows)}


class Spread(Mapping[str, Tensor]):
    """Site -> bootstrap standard deviation of each score, computed when it is first read: `make` takes as long as some passes."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self._make = make

    @cached_property
    def _found(self) -> dict[str, Tensor]:
        return self._make()

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (self._found,)


def spread_of(observed: Observations, chosen: Criterion, others: Mapping[str, Tensor]) -> Spread | None:
    """That of all sites in `observed`, beside `others`; None where the samples cannot be drawn again."""
    if not can_resample(chosen):
        return None

    def make() -> dict[str, Tensor]:
        rankings = bootstrap(observed, chosen, RESAMPLES)
        found = {name: torch.stack([ranking[name] for ranking in rankings]).std(dim=0) for name in observed}
        return {name: found.get(name, values) for name, values in others.items()}

    return Spread(make)


def unsettled_heads(scores: HeadScores, keep: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Site -> the heads whose scores lie so near to the cut that other calibration samples might decide otherwise.

    Empty where the scores have no spread. The cut is the middle between the best removed and the worst kept head, of the
    model where that separates them (a global ranking), else of each site.
    """
    if scores.spread is None:
        return {}
    reached = [name for name in scores if name not in scores.unreached]
    overall = cut_between({name: scores[name] for name in reached}, keep)
    found = {}
    for name in reached:
        cut = overall if overall is not None else cut_between({name: scores[name]}, keep)
        if cut is not None:
            near = ((scores[name] - cut).abs() < DOUBT * scores.spread[name]).nonzero().flatten()
            found[name] = tuple(near.tolist())
    return {name: heads for name, heads in found.items() if heads}


def cut_between(scores: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]]) -> float | None:
    """None where nothing is removed or kept, or where a removed head scores higher than a kept one."""
    kept: list[float] = []
    removed: list[float] = []
    for name, values in scores.items():
        stays = set(keep[name])
        for head, value in enumerate(values.tolist()):
            (kept if head in stays else removed).append(value)
    if not kept or not removed or max(removed) > min(kept):
        return None
    return (max(removed) + min(kept)) / 2
