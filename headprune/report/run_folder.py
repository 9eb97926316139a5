"""What a run's folder holds, read back as values: the material of the report and of its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headprune.errors import InvalidInput
from headprune.evaluation import Comparison
from headprune.files import read_json
from headprune.planning import PruningPlan, Sensitivity
from headprune.scoring import HeadScores, Portraits
from headprune.scoring.site_shape import SiteShape
from headprune.sweep import Sweep

LOG_LINES = 400  # of the log's end
SECTIONS = ("task", "plan", "prune", "recover", "schedule")  # of a recipe, which the report or the card looks into


@dataclass(frozen=True)
class RunFolder:
    """Everything but scores or plan may be missing, as the folder of a run that was stopped, or one put together by hand.

    scores: criterion -> scores, the run's own first. sweep: the content of sweep.json.
    """

    folder: Path
    recipe: dict[str, Any]
    scores: dict[str, HeadScores]
    plan: PruningPlan | None
    comparison: Comparison | None
    checks: dict[str, Any]
    sweep: dict[str, Any] | None
    sensitivity: Sensitivity | None
    portraits: Portraits | None
    log: str

    @property
    def shapes(self) -> dict[str, SiteShape]:
        """The geometry of every attention, in the model's order."""
        return self.plan.shapes if self.plan is not None else next(iter(self.scores.values())).shapes

    @property
    def ranking(self) -> HeadScores | None:
        """The scores that the plan came from, else the run's own."""
        if self.plan is not None and self.plan.scores is not None:
            return self.plan.scores
        return next(iter(self.scores.values()), None)


def read_run(folder: str | Path) -> RunFolder:
    """Reads the folder of `headprune run`, or any with scores*.json or plan.json of one model.

    Raises InvalidInput where it holds neither, or values of different models; CorruptCheckpoint for a newer schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder; give the folder of a run, as `headprune run` names it at its end.")
    plan = PruningPlan.load(folder / "plan.json") if (folder / "plan.json").exists() else None
    scores = all_scores(folder, plan)
    if plan is None and not scores:
        raise InvalidInput(f"{folder} holds neither scores.json nor plan.json; a report needs one of them.")
    result = document(folder / "result.json", "run_result") or {}
    checks = document(folder / "checks.json", "run_checks") or result
    sensitivity, portraits = folder / "sensitivity.json", folder / "portraits.json"
    found = RunFolder(
        folder=folder,
        recipe=recipe_of(folder / "recipe.yaml"),
        scores=scores,
        plan=plan,
        comparison=comparison_of(folder, result),
        checks=checks.get("checks", {}),
        sweep=sweep_of(folder / "sweep.json"),
        sensitivity=Sensitivity.load(sensitivity) if sensitivity.exists() else None,
        portraits=Portraits.load(portraits) if portraits.exists() else None,
        log=log_of(folder / "log.txt"),
    )
    refuse_strangers(found)
    return found


def all_scores(folder: Path, plan: PruningPlan | None) -> dict[str, HeadScores]:
    """Criterion (or file name, where a criterion comes twice with other values) -> scores; scores.json first."""
    found: dict[str, HeadScores] = {}
    for path in sorted(folder.glob("scores*.json"), key=lambda path: (path.name != "scores.json", path.name)):
        scores = HeadScores.load(path)
        if scores.criterion not in found:
            found[scores.criterion] = scores
        elif scores.to_json() != found[scores.criterion].to_json():
            found[path.stem] = scores
    if not found and plan is not None and plan.scores is not None:
        found[plan.scores.criterion] = plan.scores
    return found


def refuse_strangers(run: RunFolder) -> None:
    """InvalidInput where a value in the folder names attentions that the others do not have."""
    sites = set(run.shapes)
    named = {f"the scores by {name}": set(scores) for name, scores in run.scores.items()}
    named["sensitivity.json"] = set(run.sensitivity.curves) if run.sensitivity else set()
    named["portraits.json"] = set(run.portraits or ())
    for what, names in named.items():
        strangers = sorted(names - sites)
        if strangers or (what.startswith("the scores") and names != sites):
            one = (strangers or sorted(sites - names))[0]
            raise InvalidInput(f"{run.folder}: {what} are of another model than the plan: they differ at {one}.")


def comparison_of(folder: Path, result: dict[str, Any]) -> Comparison | None:
    try:
        return Comparison.from_json(result["comparison"]) if result else None
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / 'result.json'} is not a complete run_result file: {error!r}.") from None


def sweep_of(path: Path) -> dict[str, Any] | None:
    """Its content, once it is known to be complete."""
    if path.exists():
        Sweep.load(path)
    return document(path, "sweep")


def document(path: Path, kind: str) -> dict[str, Any] | None:
    return read_json(path, kind) if path.exists() else None


def recipe_of(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        return {}
    for name in SECTIONS:
        if not isinstance(content.get(name) or {}, dict):
            raise InvalidInput(f"{path}: {name} is {content[name]!r:.80}; expected a section, {name}.key: value.")
    return content


def log_of(path: Path) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
