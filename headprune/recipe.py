"""Recipes: one YAML file that says what a run does, checked before anything starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from headprune.arguments import check_arguments
from headprune.errors import HeadpruneError, InvalidInput, unknown_name
from headprune.planning.allocation import get_allocation
from headprune.planning.budget import Budget
from headprune.planning.engine import get_engine
from headprune.planning.units import GRANULARITIES
from headprune.recipe_yaml import apply_override, read_yaml, write_yaml
from headprune.recovery.methods import get_method
from headprune.recovery.rounded_weights import refuse_untrainable
from headprune.schedules import get_schedule, recipe_options
from headprune.scoring.criterion import get_criterion
from headprune.scoring.score import NORMALIZATIONS

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # no shell replaces ~ in a recipe, or behind an override's "="


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise InvalidInput(f"{str(value).lower()} is no number; expected one.")
        return value


class TaskSection(Section):
    """The data: what is scored on, compensated on and evaluated on."""

    name: str = Field(description="one of those that headprune tasks lists")
    options: dict[str, Any] = Field(default_factory=dict, description="of that task, by name")


class ScoreSection(Section):
    criterion: str = Field(default="fisher", description="one of those that headprune criteria lists")
    normalize: str = Field(default="none", description="none, layer_l2 or layer_sum: scores over those of their layer")
    batches: int | None = Field(default=None, ge=1, description="score on the first calibration batches alone; by default on all")
    unreached: Literal["error", "keep"] = Field(
        default="error", description="attentions that the data does not run through: keep leaves them all of their heads"
    )

    @field_validator("criterion")
    @classmethod
    def known_criterion(cls, name: str) -> str:
        get_criterion(name)
        return name

    @field_validator("normalize")
    @classmethod
    def known_normalization(cls, name: str) -> str:
        return one_of("normalization", name, NORMALIZATIONS)


class PlanSection(Section):
    budget: dict[str, float] = Field(
        default_factory=lambda: {"heads": 0.5}, description="the fraction to remove of one: heads, params, kv_cache or flops"
    )
    allocation: str | None = Field(default=None, description="global, uniform or optimal; by default global, uniform for stock")
    granularity: str | None = Field(default=None, description="query_head or kv_group; by default as in hp.plan")
    target: str = Field(default="headprune", description="where the model will run: headprune, llama.cpp, vllm or stock")
    min_heads: int = Field(default=1, ge=0, description="query heads that every attention keeps")
    protect: dict[str, list[int] | None] = Field(
        default_factory=dict, description="attention: the heads of it that must stay; null: all of them"
    )
    trials: int = Field(default=0, ge=0, description="plans to try, pruned and compensated; 0: by scores alone")
    file: Place | None = Field(default=None, description="a plan.json to carry out in place of planning, say one edited by hand")

    @field_validator("budget")
    @classmethod
    def valid_budget(cls, budget: dict[str, float]) -> dict[str, float]:
        known = [name for name in Budget.__dataclass_fields__ if name != "table"]
        for name in budget:
            one_of("budget", name, known)
        if Budget.of(budget).quantity == "latency":
            raise InvalidInput(
                "budget latency: a recipe has no latency table. Make the plan with `headprune plan --latency 0.2 --table "
                "latency.json` and name it as plan.file."
            )
        return budget

    @field_validator("allocation")
    @classmethod
    def known_allocation(cls, name: str | None) -> str | None:
        if name is not None:
            get_allocation(name)
        return name

    @field_validator("granularity")
    @classmethod
    def known_granularity(cls, name: str | None) -> str | None:
        return None if name is None else one_of("granularity", name, GRANULARITIES)

    @field_validator("target")
    @classmethod
    def known_target(cls, name: str) -> str:
        get_engine(name)
        return name


class PruneSection(Section):
    compensate: bool = Field(default=True, description="re-solve the output projections on the calibration data")
    feed_forward: bool = Field(default=False, description="re-solve also the ends of the feed-forwards")

    @model_validator(mode="after")
    def compensated_too(self) -> PruneSection:
        if self.feed_forward and not self.compensate:
            raise ValueError("feed_forward is a part of compensation; give compensate: true too, or leave it out")
        return self


class RecoverSection(Section):
    """Training after the cut, on the task's training data: for so many steps or minutes."""

    steps: int | None = Field(default=None, ge=1, description="how many steps to train; this or minutes")
    minutes: float | None = Field(default=None, gt=0, description="how long to train")
    method: str = Field(default="full", description="full, projections or lora")
    lr: float | None = Field(default=None, ge=0, description="peak learning rate; the method's own where none is given")
    distil: bool = Field(default=True, description="learn from the dense model; else by the task's own loss")
    quantise: str | None = Field(default=None, description="int8, int4 or w8a8: trains for weights that are rounded so afterwards")
    last: float = Field(default=1.0, gt=0, description="of a schedule: so many times as long after its last cut")

    @field_validator("method")
    @classmethod
    def known_method(cls, name: str) -> str:
        get_method(name)
        return name

    @model_validator(mode="after")
    def weights_that_are_rounded(self) -> RecoverSection:
        if self.quantise is not None:
            refuse_untrainable(self.quantise, self.method)
        return self

    @model_validator(mode="after")
    def one_budget(self) -> RecoverSection:
        if (self.steps is None) == (self.minutes is None):
            raise InvalidInput(f"steps={self.steps}, minutes={self.minutes}: expected one of them.")
        return self


class ScheduleSection(BaseModel):
    """A loop around score -> plan -> cut -> recover in the place of a single pass; every other key is an option of it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="one_shot, iterative, lottery_ticket or pruning_aware")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def known_options(self) -> ScheduleSection:
        known = recipe_options(self.name)
        for option in self.options:
            one_of(f"option of {self.name}", option, known)
        check_arguments(get_schedule(self.name), self.options)
        return self


class EvaluateSection(Section):
    repeats: int = Field(default=30, ge=1, description="timed forward passes of each model")


class ReportSection(Section):
    """What the report shows beside the run itself; each is measured on the dense model."""

    criteria: list[str] = Field(default_factory=list, description="further criteria, scored in the same pass")
    portraits: bool = Field(default=False, description="what each head attends to")
    sensitivity: bool = Field(default=False, description="the loss with 1, 2, 3, ... heads of each attention gone")
    sweep: list[float] = Field(default_factory=list, description="fractions of the plan's budget quantity to prune and evaluate")

    @field_validator("criteria")
    @classmethod
    def known_criteria(cls, names: list[str]) -> list[str]:
        for name in names:
            get_criterion(name)
        return names

    @field_validator("sweep")
    @classmethod
    def valid_fractions(cls, fractions: list[float]) -> list[float]:
        for fraction in fractions:
            Budget(heads=fraction)
        return fractions


class Recipe(Section):
    """One run: model -> scores -> plan -> cut -> recovery, where asked for -> evaluation, into `output`."""

    model: Place = Field(description="a folder, owner/name on the Hub, minilm or stdlib-lm")
    task: TaskSection
    score: ScoreSection = ScoreSection()
    plan: PlanSection = PlanSection()
    prune: PruneSection = PruneSection()
    recover: RecoverSection | None = None
    schedule: ScheduleSection | None = None
    evaluate: EvaluateSection = EvaluateSection()
    report: ReportSection = ReportSection()
    memory: Literal["auto", "resident", "streamed"] = Field(
        default="auto", description="streamed: read the weights layer by layer; auto: where they do not fit into memory"
    )
    device: str = Field(default="auto", description="auto: a GPU where there is one; cpu, cuda, cuda:1")
    output: Place = Field(description="the folder of the run: scores, plan, model, report")
    seed: int = Field(default=0, description="of whatever is drawn")

    @model_validator(mode="before")
    @classmethod
    def empty_sections(cls, content: Any) -> Any:
        """A section of which all keys are commented out is one that is left out."""
        defaults = {name for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if value is not None or name not in defaults}

    @model_validator(mode="after")
    def one_plan(self) -> Recipe:
        if self.schedule is not None and self.plan.file:
            raise InvalidInput(
                f"schedule {self.schedule.name} makes its own plans, so plan.file={self.plan.file} would not be read."
            )
        if self.schedule is None and self.recover is not None and self.recover.last != 1:
            raise InvalidInput(f"recover.last={self.recover.last:g} is of a schedule, and there is none; give recover.steps alone.")
        return self

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump())


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe; each override is `section.key=value` with a YAML value.

    Raises InvalidInput that names the file, the key and, for an unknown key, the nearest right one.
    """
    path = Path(path)
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"recipe {path} does not exist; expected a YAML file such as recipes/minilm.yaml.") from None
    except OSError as error:
        raise InvalidInput(f"recipe {path} cannot be read: {error.strerror}.") from None
    except InvalidInput as error:
        raise InvalidInput(f"recipe {path}: {error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"recipe {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"recipe {path} holds no keys; expected model, task, output and optional sections.")
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], origin: str) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        unknown = [problem for problem in error.errors() if problem["type"] == "extra_forbidden"]  # a misspelt key is missing too
        raise InvalidInput(f"recipe {origin}: {explain([*unknown, *error.errors()][0])}") from None


def explain(problem: ErrorDetails) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown key {location!r}.{hint} Known: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"the key {location!r} is missing."
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, HeadpruneError):
        return f"{location}: {cause}"
    return f"{location}: {problem['msg']} (got {problem['input']!r})."


def fields_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        section = next((kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)), annotation)
    return list(section.model_fields)


def one_of(kind: str, name: str, known: Iterable[str]) -> str:
    if name not in known:
        raise unknown_name(kind, name, known)
    return name
