"""Recipes that name a schedule: carried out, taken up after a kill, and checked before anything starts."""

import json
import sys

import pytest
import torch
from rich.console import Console
from small_states import SmallStates
from tiny_models import bert
from typer.testing import CliRunner

from headprune import run as run_module
from headprune.cli import app
from headprune.errors import InvalidInput
from headprune.planning import PruningPlan
from headprune.recipe import parse_recipe
from headprune.report.progress import Stages
from headprune.surgery import load


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "open_model", lambda *_: (bert(), object()))

    def build(**schedule):
        content = {"model": "bert", "task": {"name": SmallStates.name}, "output": str(tmp_path / "run"), "evaluate": {"repeats": 2}}
        return parse_recipe({**content, "schedule": schedule, "recover": {"steps": 2}}, "test")

    return build


def carried_out(recipe):
    return run_module.run(recipe, Stages(Console(quiet=True)))


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "one_shot"},
        {"name": "iterative", "steps": 2, "spacing": "cubic", "max_drop": 50.0},
        {"name": "lottery_ticket", "steps": 1, "rewind_step": 1},
        {"name": "pruning_aware", "method": "subset", "steps": 4, "teacher": True},
    ],
    ids=lambda schedule: schedule["name"],
)
def test_a_run_by_a_schedule_leaves_plan_model_history_and_comparison(recipe, schedule):
    result = carried_out(recipe(**schedule))
    assert result.plan.removed_heads == 4
    assert PruningPlan.load(result.folder / "plan.json").keep == result.plan.keep
    assert result.checks == {"reload": 0.0}
    history = json.loads((result.folder / "schedule" / "history.json").read_text())
    assert sum(len(heads) for heads in history["steps"][-1]["keep"].values()) == 4
    assert result.comparison.pruned.parameters < result.comparison.dense.parameters
    stages = [stage.title for stage in result.stages.done]
    assert any(title.endswith(": recover") for title in stages)
    assert len(set(stages)) == len(stages)


def test_a_killed_run_goes_on_in_its_schedule(recipe, monkeypatch):
    schedule = recipe(name="iterative", steps=2)
    expected = carried_out(schedule.model_copy(update={"output": schedule.output + "-whole"}))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["headprune.schedules.iterative"], "plan_of", killed
        )  # behind the first step's recovery, before its record
        with pytest.raises(KeyboardInterrupt):
            carried_out(schedule)
    result = carried_out(schedule)
    assert result.plan.keep == expected.plan.keep
    states = [load(found.folder / "model").state_dict() for found in (result, expected)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_unknown_schedules_and_options_are_named_before_anything_runs(recipe):
    for wrong, named in (
        ({"name": "iterativ"}, "iterative"),
        ({"name": "iterative", "step": 3}, "steps"),
        ({"name": "iterative", "folder": "x"}, "folder"),
        ({"steps": 3}, "schedule.name"),
    ):
        with pytest.raises(InvalidInput, match=named):
            recipe(**wrong)
    with pytest.raises(InvalidInput, match="min_heads"):
        parse_recipe({"model": "m", "task": {"name": "t"}, "output": "o", "plan": {"min_head": 3}}, "test")
    with pytest.raises(InvalidInput, match=r"recover\.last=3 is of a schedule"):
        parse_recipe({"model": "m", "task": {"name": "t"}, "output": "o", "recover": {"steps": 2, "last": 3}}, "test")
    with pytest.raises(InvalidInput, match=r"plan\.file"):
        parse_recipe(
            {"model": "m", "task": {"name": "t"}, "output": "o", "plan": {"file": "p"}, "schedule": {"name": "one_shot"}}, "test"
        )


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        ({"name": "iterative", "steps": 0}, "steps is 0"),
        ({"name": "iterative", "spacing": "cubik"}, "Did you mean 'cubic'"),
        ({"name": "iterative", "max_drop": -1.0}, "max_drop is -1"),
        ({"name": "lottery_ticket", "rewind": "weight"}, "Did you mean 'weights'"),
        ({"name": "lottery_ticket", "rewind_step": 2}, "rewind_step=2 needs"),  # of as many steps
        ({"name": "pruning_aware", "method": "subsets"}, "Did you mean 'subset'"),
        ({"name": "pruning_aware", "ramp": 2.0}, "ramp=2.0"),
    ],
)
def test_values_that_a_schedule_cannot_have_are_named_before_the_model_is_opened(recipe, schedule, named, monkeypatch):
    monkeypatch.setattr(run_module, "open_model", lambda *_: pytest.fail("opened"))
    with pytest.raises(InvalidInput, match=named):
        carried_out(recipe(**schedule))


def test_a_ticket_without_training_is_refused_before_the_model_is_opened(recipe, monkeypatch):
    monkeypatch.setattr(run_module, "open_model", lambda *_: pytest.fail("opened"))
    untrained = recipe(name="lottery_ticket").model_copy(update={"recover": None})
    with pytest.raises(InvalidInput, match="a lottery ticket is trained again after each cut"):
        carried_out(untrained)


def test_the_command_lists_schedules_and_gate_methods():
    shown = CliRunner().invoke(app, ["schedules"], env={"COLUMNS": "200"}).output
    for name in ("one_shot", "iterative", "lottery_ticket", "pruning_aware", "max_drop", "rewind_step", "hard_concrete", "subset"):
        assert name in shown
