"""Bad input from outside: exit codes, one-line errors, and that nothing is written."""

import json
import logging
import os
import subprocess
import sys

import pytest
import typer
from command_line import only_error
from tiny_models import bert

from headprune.cli import app
from headprune.scoring import score
from headprune.surgery import save

COMMANDS = {command.name or command.callback.__name__: command for command in app.registered_commands}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_and_has_an_example_of_options_that_it_takes(name):
    command = typer.main.get_command(app).commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options
    start, example = command.epilog.split(f"headprune {name}")
    assert start == "Example: "
    used = {word for word in example.split() if word.startswith("-")}
    assert used <= options
    assert command.help


def test_the_help_tells_the_exit_codes_and_completion(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "Exit codes: 0 done; 2" in out
    assert "--install-completion" in out


def test_ctrl_c_ends_with_130_and_says_so(call, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("headprune.run.run", stopped)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    code, _, err = call("--quiet", "run", "recipe.yaml")
    assert code == 130
    assert err == "stopped; nothing is half-written, and a run goes on from here with the same command\n"


def test_quiet_and_verbose_are_about_stderr(call):
    score(bert(), criterion="random").save("scores.json")
    code, out, err = call("--quiet", "plan", "scores.json", "--heads", "0.5", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["budget"] == {"heads": 0.5}
    code, _, err = call("--quiet", "plan", "scores.json", "--heads", "2")
    assert code == 2
    assert "heads=2" in only_error(err)
    assert not call("--verbose", "plan", "scores.json", "--heads", "0.5")[0]
    assert not any(isinstance(one, logging.StreamHandler) for one in logging.getLogger("headprune").handlers)


@pytest.mark.parametrize(
    "arguments", [["criteria"], ["doctor"], ["schedules"], ["report", "run"], ["prune", "./dense", "plan.json", "-o", "pruned"]]
)
def test_json_is_one_document(call, arguments):
    save(bert(), "dense")
    score(bert(), criterion="random").save("run/scores.json")
    call("plan", "run/scores.json", "--heads", "0.5")
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    assert json.loads(out)


RECIPE = {"model": "minilm", "task": {"name": "docstring-retrieval"}, "output": "out"}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["run", "none.yaml"], "recipe none.yaml does not exist"),
        (["run", "recipe.yaml", "plann.budget=1"], "Did you mean 'plan'"),
        (["run", "recipe.yaml", "plan.budget.heads=1"], "budget heads=1"),
        (["run", "recipe.yaml", "plan.target=vlm"], "Did you mean 'vllm'"),
        (["run", "recipe.yaml", "score.criterion=fischer"], "Did you mean 'fisher'"),
        (["run", "recipe.yaml", "task.name=docstring"], "Did you mean 'docstring-retrieval'"),
        (["run", "recipe.yaml", "model=minlm"], "Did you mean 'minilm'"),
        (["inspect", "empty"], "no config.json"),
        (["report", "empty"], "neither scores.json nor plan.json"),
        (["run", "recipe.yaml", "report.criteria=[fischer]"], "Did you mean 'fisher'"),
        (["run", "recipe.yaml", "report.sweep=[2]"], "heads=2"),
        (["run", "recipe.yaml", "plan.file=none.json"], "none.json does not exist"),
        (["prune", "empty", "empty/none.json", "-o", "out"], "does not exist"),
        (["plan", "bad.json", "--heads", "0.5"], "expected a head_scores file"),
        (["plan", "scores.json", "--heads", "1.5"], "heads=1.5"),
        (["plan", "scores.json"], "exactly one"),
        (["plan", "nan.json", "--heads", "0.5"], "are NaN for heads [2]"),
        (["run", "recipe.yaml", "task.options.calibration_pairs=0"], "calibration set of task docstring-retrieval is empty"),
        (["score", "minilm", "--criterion", "fischer"], "Did you mean 'fisher'"),
        (["score", "minilm", "--criterion", "fisher,entrpy"], "Did you mean 'entropy'"),
        (["score", "minilm", "--normalize", "layer"], "unknown normalization"),
        (["demo", "--model", "minlm"], "Did you mean 'minilm'"),
        (["demo", "--model", "stdlib-ml"], "Did you mean 'stdlib-lm'"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_writes_nothing(call, tmp_path, arguments, names):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    score(bert(), criterion="random").save("scores.json")
    content = json.loads((tmp_path / "scores.json").read_text())
    next(iter(content["sites"].values()))["scores"][2] = float("nan")
    (tmp_path / "nan.json").write_text(json.dumps(content))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, _, err = call(*arguments)
    assert code == 2
    assert names in only_error(err)
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_nothing_is_fetched_unless_it_is_asked_for():
    for given, expected in ((None, "True"), ("0", "False")):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {} if given is None else {"HF_HUB_OFFLINE": given}
        code = "import headprune.cli, huggingface_hub; print(huggingface_hub.is_offline_mode())"
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected
