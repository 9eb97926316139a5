"""What `headprune score` tells: the scores, how far criteria agree and rankings can be trusted, what heads attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from headprune.models.identity import ModelIdentity
from headprune.scoring import HeadScores, Observations, Portraits, Stability, portraits, ranking_stability, score_observations
from headprune.scoring.agreement import Agreement
from headprune.scoring.criterion import get_criterion
from headprune.scoring.stability import can_resample

ENOUGH = 0.9  # Spearman correlation of rankings from other draws of the samples, below which a warning says so


@dataclass(frozen=True)
class ScoreReport:
    """stability: criterion -> that of its ranking, where it keeps its samples apart."""

    scores: dict[str, HeadScores]
    agreements: dict[tuple[str, str], Agreement]
    stability: dict[str, Stability]
    portraits: Portraits | None = None

    @classmethod
    def of(
        cls,
        observed: Observations,
        names: Sequence[str],
        normalize: str = "none",
        portray: bool = False,
        made_for: ModelIdentity | None = None,
    ) -> ScoreReport:
        """made_for: the model that was observed, which the scores and their plans then name."""
        scores = {name: replace(score_observations(observed, name, normalize), made_for=made_for) for name in names}
        agreements = {(one, other): scores[one].compare(scores[other]) for one, other in combinations(names, 2)}
        stable = {name: ranking_stability(observed, name) for name in names if can_resample(get_criterion(name))}
        return cls(scores, agreements, stable, portraits(observed) if portray else None)

    def save(self, path: Path) -> list[Path]:
        """Each criterion's scores: at `path`, or where there are several at PATH-CRITERION.json; portraits.json beside them."""
        several = len(self.scores) > 1
        paths = {name: path.with_name(f"{path.stem}-{name}{path.suffix}") if several else path for name in self.scores}
        for name, target in paths.items():
            self.scores[name].save(target)
        if self.portraits is not None:
            self.portraits.save(path.with_name("portraits.json"))
        return [*paths.values(), *([] if self.portraits is None else [path.with_name("portraits.json")])]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "scores": {name: scores.to_json() for name, scores in self.scores.items()},
            "agreement": [
                {"criteria": list(pair), "spearman": agreed.spearman, "overlap": agreed.overlap, "keep": agreed.keep}
                for pair, agreed in self.agreements.items()
            ],
            "stability": {name: asdict(stable) for name, stable in self.stability.items()},
        }
        if self.portraits is not None:
            found["portraits"] = self.portraits.to_json()
        return found

    def tables(self) -> list[RenderableType]:
        shown: list[RenderableType] = list(self.scores.values())
        if self.agreements:
            table = Table(title="agreement of criteria", title_justify="left", show_header=False)
            for (one, other), agreed in self.agreements.items():
                table.add_row(f"{one}, {other}", str(agreed))
            shown.append(table)
        if self.stability:
            table = Table(title="stability: rankings from other draws of the same samples", title_justify="left", show_header=False)
            for name, stable in self.stability.items():
                table.add_row(name, str(stable))
            shown.append(table)
        return shown if self.portraits is None else [*shown, self.portraits]

    def warnings(self) -> list[str]:
        """One line for each criterion whose ranking too few samples decide."""
        return [
            f"{name}: too few calibration samples to rank the heads near a cut of {stable.keep:.0%} ({stable}); give more."
            for name, stable in self.stability.items()
            if stable.spearman < ENOUGH
        ]
