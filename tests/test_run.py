"""A run of a recipe: whole, taken up after a kill, and refused where the folder is another's."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from small_states import SmallStates
from tiny_models import bert, hidden, tokens

import headprune as hp
from headprune import run as run_module
from headprune import run_values
from headprune.errors import HeadpruneError, InvalidInput
from headprune.planning import PruningPlan
from headprune.recipe import PlanSection, RecoverSection, ReportSection, load_recipe, parse_recipe
from headprune.report.progress import Stages
from headprune.report.run_folder import read_run
from headprune.run_recovery import as_asked
from headprune.scoring import HeadScores, observe
from headprune.surgery import load


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "open_model", lambda *_: (bert(), object()))
    return parse_recipe(
        {"model": "bert", "task": {"name": SmallStates.name}, "output": str(tmp_path / "run"), "evaluate": {"repeats": 2}}, "test"
    )


def carried_out(recipe):
    return run_module.run(recipe, Stages(Console(quiet=True)))


def test_a_run_leaves_every_value_of_the_way(recipe):
    result = carried_out(recipe)
    assert {path.name for path in result.folder.iterdir()} == {
        "recipe.yaml", "inputs.json", "scores.json", "plan.json", "model", "checks.json", "result.json", "report.html",
    }  # fmt: skip
    assert result.plan.removed_heads == 4
    assert result.checks["reload"] == 0.0
    assert result.checks["cut_equals_gated"] < 1e-5
    written = json.loads((result.folder / "result.json").read_text())
    assert written["comparison"]["pruned"]["parameters"] == result.comparison.pruned.parameters
    assert PruningPlan.load(result.folder / "plan.json").keep == result.plan.keep
    titles = [stage["title"] for stage in written["stages"]]
    assert [titles.index(name) for name in ("score heads by fisher", "plan", "cut and re-solve output projections")] == [2, 3, 4]
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e7 for stage in written["stages"])
    assert result.stages.__rich__().row_count == len(titles)


def test_plans_are_tried_by_what_the_task_reads(recipe, monkeypatch):
    read = []
    monkeypatch.setattr(SmallStates, "readout", lambda task, model, batch: read.append(batch) or task.forward(model, batch))
    content = recipe.model_dump() | {"plan": {"budget": {"heads": 0.5}, "trials": 2}}
    carried_out(parse_recipe(content, "test"))
    assert len(read) > len(SmallStates().calibration)  # the dense model and each plan


def test_a_run_recovers_where_it_is_asked_to(recipe, tmp_path):
    plain = carried_out(recipe)
    section = RecoverSection(steps=40, lr=1e-3)
    result = carried_out(recipe.model_copy(update={"output": recipe.output + "-recovered", "recover": section}))
    assert result.plan.keep == plain.plan.keep
    dense, batch = bert(), {"input_ids": tokens(4, 8, 0)}
    error = [
        float((hidden(load(folder), **batch) - hidden(dense, **batch)).square().mean())
        for folder in (result.folder / "model", result.folder / "recovered")
    ]
    assert error[1] < error[0]
    recovered = hidden(load(result.folder / "recovered"), input_ids=tokens(4, 8, 50))
    assert result.comparison.pruned.quality["norm"] == float(recovered.norm())


def test_a_recovery_needs_one_budget():
    content = {"model": "bert", "task": {"name": SmallStates.name}, "output": "out"}
    with pytest.raises(InvalidInput, match="steps=None, minutes=None: expected one of them"):
        parse_recipe({**content, "recover": {}}, "test")
    with pytest.raises(InvalidInput, match="unknown recovery method 'lore'"):
        parse_recipe({**content, "recover": {"steps": 2, "method": "lore"}}, "test")
    with pytest.raises(InvalidInput, match="Did you mean 'minutes'"):
        parse_recipe({**content, "recover": {"minuts": 2}}, "test")


@pytest.mark.parametrize(
    "section", [{"seed": True}, {"recover": {"steps": True}}, {"recover": {"minutes": True}}, {"evaluate": {"repeats": True}}]
)
def test_a_switch_is_no_number(section):
    with pytest.raises(InvalidInput, match=r"(seed|steps|minutes|repeats): true is no number"):
        parse_recipe({"model": "bert", "task": {"name": SmallStates.name}, "output": "out", **section}, "test")


def test_a_run_may_train_for_rounded_weights(recipe):
    """As hp.recover(quantise=...) trains what the run has cut; the model that is saved is not rounded."""
    pytest.importorskip("torchao")
    result = carried_out(recipe.model_copy(update={"recover": RecoverSection(steps=3, lr=1e-3, quantise="int4")}))
    found, task, trained = load(result.folder / "recovered"), SmallStates(), {}
    for form in (None, "int4"):
        trained[form] = load(result.folder / "model")
        hp.recover(
            trained[form], task.training(), loss_fn=task.loss, teacher=bert(), steps=3, lr=1e-3, seed=recipe.seed, quantise=form
        )
    batch = {"input_ids": tokens()}
    torch.testing.assert_close(hidden(found, **batch), hidden(trained["int4"], **batch), rtol=1e-5, atol=1e-5)
    assert float((hidden(found, **batch) - hidden(trained[None], **batch)).abs().max()) > 1e-3
    assert len(found.encoder.layer[0].intermediate.dense.weight.unique()) > 1000
    for wrong, message in (("int3", "unknown form of weights 'int3'"), ("int4", "give 'full' or 'projections'")):
        with pytest.raises(InvalidInput, match=message):
            parse_recipe(recipe.model_dump() | {"recover": {"steps": 2, "method": "lora", "quantise": wrong}}, "test")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: [", (), "recipe .* is not YAML: "),
        ("[" * 100_000, (), "recipe .* is not YAML: brackets are nested too deeply"),
        ("- model", (), "recipe .* holds no keys; expected model, task, output"),
        ("model: bert", ["plan.budget.heads"], r"override 'plan\.budget\.heads': expected section\.key=value, for example"),
        ("model: bert", ["model.name=3"], "override 'model.name=3': model is no section"),
        ("plan: {trials: 1}\nmodel: bert\nplan: {trials: 2}", (), r"recipe .*\.yaml: 'plan' stands twice in the section of line 1"),
        ("model: bert\nplan: {trials: 1, trials: 2}", (), "'trials' stands twice in the section of line 2"),
        ("modle: bert\ntask: {name: t}\noutput: o", (), "unknown key 'modle'. Did you mean 'model'"),
        (
            "model: bert\ntask: {name: t}\noutput: o\nschedule: {name: iterative, steps: four}",
            (),
            "schedule: steps is 'four'; expected a whole number",
        ),
        ("model: bert", ["output=["], r"override 'output=\[': '\[' is not a YAML value"),
        (
            "model: bert",
            ["task.name=t", "output=o", "plan.budget.latency=0.2"],
            "a recipe has no latency table.* name it as plan.file",
        ),
    ],
)
def test_a_recipe_that_cannot_be_read_says_where(tmp_path, text, overrides, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)


def test_a_section_may_be_left_empty_and_filled_by_an_override(tmp_path):
    """Its keys commented out, or null, as recipe.yaml in a run's folder has them."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: bert\ntask: {name: t}\noutput: o\nplan:\n  # trials: 3\nrecover:\nreport:\n")
    plain = load_recipe(path)
    assert (plain.plan, plain.recover, plain.report) == (PlanSection(), None, ReportSection())
    path.write_text(plain.to_yaml())
    assert load_recipe(path, ["recover.steps=2"]).recover.steps == 2
    assert load_recipe(path, ["schedule.name=iterative"]).schedule.name == "iterative"


def test_numbers_need_no_point_before_their_exponent(tmp_path):
    """As in YAML 1.2 and in Python; a folder of such a name is a name all the same."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: '1e5'\ntask: {name: t, options: {share: 1E-1}}\noutput: '2e+3'\n")
    found = load_recipe(path, ["schedule.name=pruning_aware", "schedule.gate_lr=1e-2"])
    assert (found.schedule.options, found.task.options) == ({"gate_lr": 0.01}, {"share": 0.1})
    path.write_text(found.to_yaml())
    assert load_recipe(path) == found


def test_a_recipe_s_paths_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    content = {"model": "~/llama", "task": {"name": SmallStates.name}, "output": "~/runs/1", "plan": {"file": "~/plan.json"}}
    found = parse_recipe(content, "test")
    assert (found.model, found.output, found.plan.file) == (
        "/home/somebody/llama", "/home/somebody/runs/1", "/home/somebody/plan.json"
    )  # fmt: skip


def test_feed_forwards_are_re_solved_only_together_with_the_projections():
    content = {"model": "bert", "task": {"name": SmallStates.name}, "output": "out"}
    with pytest.raises(InvalidInput, match=r"prune: .*feed_forward is a part of compensation; give compensate: true too"):
        parse_recipe({**content, "prune": {"compensate": False, "feed_forward": True}}, "test")


@pytest.mark.parametrize("stage", ["planned", "prune", "save", "compare"])
def test_a_killed_run_goes_on_and_ends_the_same(recipe, monkeypatch, stage):
    expected = carried_out(recipe.model_copy(update={"output": recipe.output + "-whole"}))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            carried_out(recipe)
    result = carried_out(recipe)
    assert result.plan.keep == expected.plan.keep
    assert all(
        torch.equal(value, load(expected.folder / "model").state_dict()[name])
        for name, value in load(result.folder / "model").state_dict().items()
    )


def test_a_finished_stage_is_not_done_again(recipe, monkeypatch):
    carried_out(recipe)
    for module, stage in ((run_values, "observe"), (run_module, "plan_of"), (run_module, "prune")):
        monkeypatch.setattr(module, stage, lambda *_, **__: pytest.fail("done twice"))
    assert carried_out(recipe).plan.removed_heads == 4


def test_a_finished_run_measures_what_its_report_is_to_show_later(recipe, monkeypatch):
    carried_out(recipe)
    for stage in ("plan_of", "prune"):
        monkeypatch.setattr(run_module, stage, lambda *_, **__: pytest.fail("done twice"))
    wanted = {"criteria": ["magnitude_l1", "entropy"], "portraits": True, "sensitivity": True, "sweep": [0.25]}
    folder = carried_out(recipe.model_copy(update={"report": ReportSection(**wanted)})).folder
    assert HeadScores.load(folder / "scores-entropy.json").criterion == "entropy"
    found = read_run(folder)
    assert list(found.scores) == ["fisher", "entropy", "magnitude_l1"]
    assert set(found.portraits) == set(found.sensitivity.curves) == set(found.plan)
    assert [point["budget"] for point in found.sweep["points"]] == [{"heads": 0.0}, {"heads": 0.25}]


def test_a_run_carries_out_a_plan_by_hand(recipe, tmp_path):
    plan = PruningPlan.from_keep(bert(), {"encoder.layer.0.attention": [1]})
    plan.save(tmp_path / "mine.json")
    section = recipe.plan.model_copy(update={"file": str(tmp_path / "mine.json")})
    recipe = recipe.model_copy(update={"plan": section})
    result = carried_out(recipe)
    assert result.plan.keep == plan.keep
    assert result.checks["cut_equals_gated"] < 1e-5
    PruningPlan.from_keep(bert(), {"encoder.layer.0.attention": [2]}).save(tmp_path / "mine.json")
    with pytest.raises(InvalidInput, match=r"mine\.json has changed since the run in .* began"):
        carried_out(recipe)


def test_a_run_that_was_killed_at_its_first_file_begins_anew(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.x1y2z3").write_text("model:")
    assert carried_out(recipe).report.exists()


def test_a_folder_has_one_process_at_a_time(recipe, tmp_path):
    """Two that train for minutes each mixed their weights, checkpoints and results there. The lock of one that is killed goes."""
    hold = (
        "import pathlib, sys; from headprune.files import alone_in\nwith alone_in(pathlib.Path('run')): print(flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(InvalidInput, match=r"another process is at work in .*run; wait until it is done"):
            carried_out(recipe)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        other.kill()
    assert carried_out(recipe).report.exists()
    assert carried_out(recipe).report.exists()


def test_a_folder_of_another_run_is_refused(recipe, tmp_path):
    carried_out(recipe)
    with pytest.raises(InvalidInput, match="another recipe"):
        carried_out(recipe.model_copy(update={"seed": 1}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InvalidInput, match="holds no run"):
        carried_out(recipe.model_copy(update={"output": str(tmp_path / "mine")}))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    bert().save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidInput, match="holds no run"):
        carried_out(recipe.model_copy(update={"output": str(tmp_path / "model")}))
    assert not (tmp_path / "model" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"budget": {"heads": 0.95}}, "95% of heads away cannot be met"),
        ({"protect": {"encoder.layer.0.attn": None}}, "unknown attention site in protect 'encoder.layer.0.attn'"),
        ({"protect": {"encoder.layer.0.attn": None}, "target": "llama.cpp"}, "unknown attention site in protect"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_scored(recipe, tmp_path, section, message):
    with pytest.raises(HeadpruneError, match=message):
        carried_out(parse_recipe(recipe.model_dump() | {"plan": section}, "test"))
    assert not (tmp_path / "run").exists()


def test_scores_serve_another_plan_as_long_as_there_is_none(recipe, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "planned", killed)
        with pytest.raises(KeyboardInterrupt):
            carried_out(recipe)
    monkeypatch.setattr(run_values, "observe", None)  # not called again
    further = parse_recipe(recipe.model_dump() | {"plan": {"budget": {"heads": 0.25}}}, "test")
    assert carried_out(further).plan.removed_heads == 2
    assert load_recipe(further.output + "/recipe.yaml") == further
    with pytest.raises(InvalidInput, match="another recipe"):
        carried_out(recipe)


def test_a_model_that_fails_its_checks_is_not_passed_on(recipe, monkeypatch):
    monkeypatch.setattr(run_module, "cut_error", lambda *_: 0.5)
    with pytest.raises(HeadpruneError, match=r"cut_equals_gated.*0\.5"):
        carried_out(recipe)
    assert not (run_module.Path(recipe.output) / "checks.json").exists()


def test_a_run_that_resolves_feed_forwards_too_passes_its_checks(recipe):
    result = carried_out(recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"feed_forward": True})}))
    assert result.checks["cut_equals_gated"] < 1e-5
    dense, pruned = bert(), load(result.folder / "model")
    ends = zip(pruned.encoder.layer, dense.encoder.layer)
    assert not all(torch.equal(one.output.dense.weight, other.output.dense.weight) for one, other in ends)


def test_a_run_may_score_on_its_first_batches_alone(recipe, monkeypatch):
    seen = []

    def observing(model, batches, *args, **options):
        seen.append(len(batches))
        return observe(model, batches, *args, **options)

    monkeypatch.setattr(run_values, "observe", observing)
    carried_out(recipe.model_copy(update={"score": recipe.score.model_copy(update={"batches": 2})}))
    assert seen == [2]


def test_a_run_may_try_plans_on_its_calibration_data(recipe):
    searched = recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"trials": 3})})
    result = carried_out(searched)
    titles = [stage.title for stage in result.stages.done]
    assert "try plans, pruned and compensated" in titles
    assert "plan" not in titles
    assert result.plan.removed_heads == 4


def test_a_run_does_not_go_on_with_other_data_of_the_same_name(recipe, monkeypatch):
    carried_out(recipe)
    carried_out(recipe)
    first = SmallStates.__init__
    monkeypatch.setattr(SmallStates, "__init__", lambda task, tokenizer=None: (first(task), task.calibration.pop())[0])
    with pytest.raises(InvalidInput, match=f"the data of task {SmallStates.name} has changed since the run in .* began"):
        carried_out(recipe)


def test_a_run_does_not_go_on_with_other_weights_in_the_same_folder(recipe, tmp_path):
    folder = tmp_path / "dense"
    bert().save_pretrained(folder)
    recipe = recipe.model_copy(update={"model": str(folder)})
    carried_out(recipe)
    model = bert()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight.mul_(1.01)
    model.save_pretrained(folder)
    with pytest.raises(InvalidInput, match=r"the weights in .*dense have changed since the run in .* began.*give another output"):
        carried_out(recipe)
    (tmp_path / "run" / "inputs.json").unlink()  # as a run of an earlier version
    carried_out(recipe)


def test_a_file_in_the_place_of_the_output_is_told(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InvalidInput, match="run is a file; give a folder to write to"):
        carried_out(recipe)


def test_a_recipe_for_the_cpu_trains_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert as_asked("cpu") == {"use_cpu": True}
    assert as_asked("auto") == as_asked("cuda:1") == {}
