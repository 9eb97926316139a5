"""Bad input from outside: exit codes, one-line errors, and that nothing is written."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import typer
from command_line import only_error
from letter_tokenizer import letter_tokenizer
from small_states import SmallStates
from tiny_models import bert, tokens

from headprune.cli import app, main, terminal
from headprune.scoring import score
from headprune.surgery import save
from headprune.version import __version__

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
    text = " ".join(out.split())
    for told in (
        "Exit codes: 0 done; 2 something that you can put right",
        "130 stopped by Ctrl-C, 143 by SIGTERM",
        "1 an error in headprune.",
    ):
        assert told in text
    assert "--install-completion" in out


def test_ctrl_c_ends_with_130_and_says_so(call, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("headprune.run.run", stopped)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    code, _, err = call("--quiet", "run", "recipe.yaml")
    assert code == 130
    assert err == "stopped; nothing is half-written, and a run goes on from here with the same command\n"


@pytest.fixture
def unsettled(tmp_path, monkeypatch):
    """scores.json of too few samples, of which a plan warns."""
    monkeypatch.chdir(tmp_path)
    scores = score(bert(), [{"input_ids": tokens(2, 9)}], "fisher", loss_fn=hidden_loss)
    scores.save(tmp_path / "scores.json")


def hidden_loss(model, batch):
    return model(**batch).last_hidden_state.square().mean(dim=(1, 2))


WARNING = "too few calibration samples"


def test_quiet_leaves_results_and_errors(call, unsettled):
    code, out, err = call("--quiet", "plan", "scores.json", "--heads", "0.5", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["budget"] == {"heads": 0.5}
    code, _, err = call("--quiet", "plan", "scores.json", "--heads", "2")
    assert code == 2
    assert err == only_error(err) + "\n"
    assert "heads=2" in err


def test_without_quiet_stages_and_warnings_are_shown_a_line_each(call, unsettled):
    code, out, err = call("plan", "scores.json", "--heads", "0.5", "--json")
    assert code == 0
    assert json.loads(out)
    assert [line[:8] for line in err.splitlines()] == [WARNING[:8], "✓ plan 0"]


def test_verbose_shows_the_log_and_where_an_error_comes_from(call, unsettled):
    log, dated = logging.getLogger("headprune"), re.compile(r"^20\d\d-\d\d-\d\d .*", re.MULTILINE)
    before = (log.level, list(log.handlers))
    code, _, err = call("--verbose", "plan", "scores.json", "--heads", "0.5")
    assert code == 0
    assert WARNING in dated.search(err)[0]
    code, _, err = call("--verbose", "plan", "scores.json", "--heads", "2")
    assert code == 2
    assert "where the error comes from" in dated.search(err)[0]
    assert "planning/budget.py" in err
    assert err.splitlines()[-1].startswith("error: budget heads=2")
    assert (log.level, list(log.handlers)) == before
    code, _, err = call("--verbose", "--quiet", "plan", "scores.json", "--heads", "0.5")
    assert code == 2
    assert "--quiet and --verbose" in only_error(err)


def test_an_error_in_headprune_ends_with_1_and_its_traceback(call, monkeypatch, tmp_path):
    monkeypatch.setattr("headprune.run.run", lambda *_: {}["nothing"])
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    code, out, err = call("--quiet", "run", "recipe.yaml")
    assert (code, out) == (1, "")
    assert "KeyError: 'nothing'" in err
    assert err.splitlines()[-1].startswith("error in headprune:")


def test_what_the_system_refuses_is_one_line(call, monkeypatch, tmp_path):
    """A folder of somebody else; root, as whom tests may run, reads everything."""

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "locked/model")

    monkeypatch.setattr("headprune.sources.model_folder", refused)
    code, out, err = call("inspect", "locked/model")
    assert (code, out) == (2, "")
    assert only_error(err) == "error: locked/model: Permission denied."
    code, _, err = call("--verbose", "inspect", "locked/model")
    assert "PermissionError" in err


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "headprune", "--version"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert only_error(found.stderr) == "error: what was to be written: No space left on device."


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_some_character_gets_its_number(monkeypatch, unsettled, encoding):
    """The plan was saved, and telling so was an error in headprune."""
    for more in ((), ("--json",)):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr(terminal, "console", type(terminal.console)(width=160))
        monkeypatch.setattr("sys.argv", ["headprune", "--quiet", "plan", "scores.json", "--heads", "0.5", *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        told = out.buffer.getvalue().decode(encoding)
        assert json.loads(told)["kind"] == "pruning_plan" if more else "\\u25a0 stays" in told


def test_json_is_json_in_any_encoding(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    terminal.take_every_character()
    monkeypatch.setattr(terminal, "console", type(terminal.console)())
    terminal.show(True, {"folder": "mod\u00e8le \U0001f600"})
    assert json.loads(out.buffer.getvalue().decode("ascii")) == {"folder": "mod\u00e8le \U0001f600"}


def test_the_version_is_told(call):
    assert call("--version") == (0, f"headprune {__version__}\n", "")


def test_headprune_alone_shows_its_help(call):
    code, out, err = call()
    assert code == 2
    assert "sensitivity" in out + err


TASK = ("--task", SmallStates.name)
STORY = {  # every command on a tiny model, each on what those before it have written; demo is a run of its own recipe
    "score": ("./dense", "--criterion", "fisher", *TASK),
    "sensitivity": ("./dense", "scores.json", "--batches", "1", *TASK),
    "plan": ("scores.json", "--heads", "0.5"),
    "sweep": ("./dense", "scores.json", "--budgets", "0.25", *TASK),
    "latency": ("./dense", *TASK),
    "prune": ("./dense", "plan.json", "-o", "pruned", *TASK),
    "recover": ("./pruned", "-o", "recovered", "--steps", "2", *TASK),
    "evaluate": ("./recovered", "--against", "./dense", "--repeats", "1", *TASK),
    "compare": ("./dense", "--methods", "heads-plain", "--steps", "0", "--repeats", "1", "--trials", "0", *TASK),
    "inspect": ("./pruned",),
    "diff": ("./dense", "./pruned"),
    "export": ("./pruned", "--to", "stock", "-o", "stock"),
    "estimate": ("./dense", "--heads", "0.5", "--device", "h100"),
    "run": ("recipe.yaml", "output=run", "evaluate.repeats=1"),
    "report": ("run",),
    "criteria": (),
    "schedules": (),
    "tasks": (),
    "doctor": (),
}


def test_what_every_command_prints_with_json_is_one_document(call, tmp_path):
    assert set(STORY) == set(COMMANDS) - {"demo"}
    save(bert(), "dense", tokenizer=letter_tokenizer())
    (tmp_path / "recipe.yaml").write_text(json.dumps({**RECIPE, "model": "./dense", "task": {"name": SmallStates.name}}))
    for name, arguments in STORY.items():
        code, out, err = call(name, *arguments, "--json")
        assert code == 0, (name, err)
        assert json.loads(out), name
        assert all(line.startswith(("✓ ", "too few calibration samples")) for line in err.splitlines()), (name, err)


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
        (
            ["plan", "scores.json"],
            "Give --heads 0.5 (half of the query heads), or one of --params, --kv-cache, --flops, --latency.",
        ),
        (
            ["plan", "none.json", "--heads", "0.5", "--kv-cache", "0.5"],
            "--heads, --kv-cache are given, and a budget is one of them",
        ),
        (["estimate", "minilm"], "Give --heads 0.5 (half of the query heads), or one of --params, --kv-cache, --flops."),
        (["estimate", "minilm", "--flops", "0.5", "--params", "0.5"], "--params, --flops are given"),
        (["plan", "nan.json", "--heads", "0.5"], "are NaN for heads [2]"),
        (["run", "recipe.yaml", "task.options.calibration_pairs=0"], "calibration set of task docstring-retrieval is empty"),
        (["score", "minilm", "--criterion", "fischer"], "Did you mean 'fisher'"),
        (["score", "minilm", "--criterion", "fisher,entrpy"], "Did you mean 'entropy'"),
        (["score", "minilm", "--normalize", "layer"], "unknown normalization"),
        (["demo", "--model", "minlm"], "Did you mean 'minilm'"),
        (["demo", "--model", "stdlib-ml"], "Did you mean 'stdlib-lm'"),
        (["plan"], "Missing argument 'scores'. See headprune plan --help."),
        (["plan", "scores.json", "--heads", "half"], "Invalid value for '--heads'"),
        (["plan", "scores.json", "--haeds", "0.5"], "No such option: --haeds"),
        (["pla"], "No such command 'pla'. Did you mean 'plan'"),
        (["score", "minilm", "-o", "bad.json/scores.json"], "bad.json is a file, not a folder"),
        (["sensitivity", "minilm", "scores.json", "--csv", "bad.json/x.csv"], "bad.json is a file, not a folder"),
        (["report", "empty", "--figures", "bad.json/plots"], "bad.json is a file, not a folder"),
        (["recover", "minilm", "-o", "out", "--steps", "0"], "steps is 0; expected more than 0"),
        (["recover", "minilm", "-o", "out", "--method", "lore"], "Did you mean 'lora'"),
        (["estimate", "minilm", "--heads", "0.5", "--device", "h900"], "unknown device 'h900'"),
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


def test_a_tokenizer_that_does_not_load_is_one_line(call, tmp_path):
    save(bert(), "dense", tokenizer=letter_tokenizer())
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    code, _, err = call("score", "./dense")
    assert code == 2
    assert "the tokenizer in dense does not load" in only_error(err)


def test_python_runs_the_package_as_the_command():
    found = subprocess.run([sys.executable, "-m", "headprune", "--version"], capture_output=True, text=True, check=True)
    assert __version__ in found.stdout
    found = subprocess.run([sys.executable, "-m", "headprune", "plan", "nowhere.json"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "error:" in found.stderr


def test_nothing_that_is_imported_talks():
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "headprune", "--quiet", "criteria", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == ""


def test_kernels_that_bitsandbytes_lacks_are_no_news():
    """Which it tells of where the processor has AVX-512 with bf16."""
    told = "import headprune.cli, logging; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load CPU gemm')"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stderr == ""


def test_nothing_is_fetched_unless_it_is_asked_for():
    for given, expected in ((None, "True"), ("0", "False")):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {} if given is None else {"HF_HUB_OFFLINE": given}
        code = "import headprune.cli, huggingface_hub; print(huggingface_hub.is_offline_mode())"
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected
