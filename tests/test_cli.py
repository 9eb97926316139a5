"""The command line from outside: exit codes, one-line errors, and that nothing is half-written."""

import json
import resource

import pytest
import torch
from tiny_models import bert, tokens
from transformers import BertModel

from headprune import cli
from headprune.planning import LatencyTable, PruningPlan
from headprune.planning.latency_table import key_of
from headprune.scoring import HeadScores, score
from headprune.surgery import cut, load, save


def headprune(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one call."""
    monkeypatch.setattr("sys.argv", ["headprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("console", "progress_console"):
        monkeypatch.setattr(cli, name, type(cli.console)(stderr=name != "console", width=160))
    return lambda *arguments: headprune(monkeypatch, capsys, *arguments)


def test_plan_prune_and_inspect_on_a_folder(call, tmp_path):
    save(bert(), "dense")
    score(bert(), criterion="magnitude_l1").save("scores.json")
    code, out, err = call("plan", "scores.json", "--heads", "0.5")
    assert code == 0, err
    assert "4 of 8 query heads go" in out
    code, out, err = call("prune", "./dense", "plan.json", "-o", "pruned")
    assert code == 0, err
    kept = PruningPlan.load("plan.json")
    assert {name: tuple(site["kept"]) for name, site in load("pruned").config.headprune["sites"].items()} == kept.keep
    code, out, err = call("inspect", "./pruned")
    assert code == 0, err
    assert "encoder.layer.1.attention" in out


def test_a_pruned_folder_is_exported_to_the_stock_class(call):
    pruned = bert()
    cut(pruned, {"encoder.layer.0.attention": [1], "encoder.layer.1.attention": [0, 2, 3]})
    save(pruned, "pruned")
    code, out, err = call("export", "./pruned", "--to", "stock", "-o", "stock")
    assert code == 0, err
    assert "dead heads" in out
    assert BertModel.from_pretrained("stock").config.num_attention_heads == 4  # BERT divides its hidden size by them
    code, _, err = call("export", "./pruned", "--to", "tensorrt", "-o", "other")
    assert code == 2
    assert "unknown export target" in err


def test_a_latency_table_of_another_machine_is_refused_unless_it_is_meant(call):
    scores = score(bert(), criterion="magnitude_l1")
    scores.save("scores.json")
    shape = scores.shapes["encoder.layer.0.attention"]
    LatencyTable("a phone", "float32", 1, 8, {key_of(shape): (0, 1, 2, 3, 4)}, 0).save("latency.json")
    arguments = ("plan", "scores.json", "--latency", "0.5", "--table", "latency.json")
    code, _, err = call(*arguments)
    assert code == 2
    assert "measured on a phone" in err
    code, out, err = call(*arguments, "--other-machine")
    assert code == 0, err
    assert "4 of 8 query heads go" in out


def test_doctor_says_what_runs_each_operator(call):
    code, out, err = call("doctor")
    assert code == 0, err
    assert "attention_backward" in out
    assert "runs through" in out


def test_criteria_lists_names_and_sources(call):
    code, out, _ = call("criteria")
    assert code == 0
    assert "fisher" in out
    assert "Kwon" in out


class TinyTask:
    """What `headprune score` asks of a task."""

    tokenizer = None

    def __init__(self, samples: int = 4):
        self.calibration = [{"input_ids": tokens(samples, 9, seed)} for seed in range(2)]

    def loss(self, model, batch):
        return model(**batch).last_hidden_state.square().mean(dim=(1, 2))


@pytest.fixture
def tiny_task(monkeypatch):
    monkeypatch.setattr(cli, "opened", lambda model, task: (bert(), TinyTask()))


def test_score_shows_heat_maps_agreement_stability_and_portraits(call, tiny_task):
    code, out, err = call("score", "tiny", "--criterion", "fisher, entropy,least_squares", "--portraits")
    assert code == 0, err
    for shown in ("fisher: percentile of each head", "agreement of criteria", "fisher, entropy", "stability", "portraits"):
        assert shown in out
    assert "too few calibration samples to rank" in err
    for name in ("fisher", "entropy", "least_squares"):
        found = HeadScores.load(f"scores-{name}.json")
        expected = score(bert(), TinyTask().calibration, name, loss_fn=TinyTask().loss)
        assert all(torch.allclose(found[site], expected[site], rtol=1e-3, atol=1e-8) for site in expected)


def test_score_prints_one_json_document(call, tiny_task):
    code, out, err = call("score", "tiny", "--json", "--portraits", "--normalize", "layer_l2")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["scores"]) == ["fisher"]
    assert found["agreement"] == []
    assert 0 <= found["stability"]["fisher"]["overlap"] <= 1
    assert len(found["portraits"]["encoder.layer.0.attention"]) == 4
    assert HeadScores.load("scores.json").to_json() == found["scores"]["fisher"]


RECIPE = {"model": "minilm", "task": {"name": "docstring-retrieval"}, "output": "out"}


def only_error(err: str) -> str:
    """The one line on stderr that is an error; stages that ended well may precede it."""
    (error,) = (line for line in err.splitlines() if line and not line.startswith("✓"))
    assert error.startswith("error:")
    return error


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["run", "none.yaml"], "recipe none.yaml does not exist"),
        (["run", "recipe.yaml", "plann.budget=1"], "Did you mean 'plan'"),
        (["run", "recipe.yaml", "plan.budget.heads=1"], "budget heads=1"),
        (["run", "recipe.yaml", "score.criterion=fischer"], "Did you mean 'fisher'"),
        (["run", "recipe.yaml", "task.name=docstring"], "Did you mean 'docstring-retrieval'"),
        (["run", "recipe.yaml", "model=minlm"], "Did you mean 'minilm'"),
        (["inspect", "empty"], "no config.json"),
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


def test_a_disk_that_is_full_while_saving_is_one_line_and_leaves_nothing(call, tmp_path):
    save(bert(), "dense")
    score(bert(), criterion="random").save("scores.json")
    call("plan", "scores.json", "--heads", "0.5")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code, _, err = call("prune", "./dense", "plan.json", "-o", "out/pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "cannot write out/pruned" in only_error(err)
    assert list((tmp_path / "out").iterdir()) == []
