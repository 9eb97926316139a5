"""Bad input from outside: exit codes, one-line errors, and that nothing is written."""

import json
import os
import subprocess
import sys

import pytest
from command_line import only_error
from tiny_models import bert

from headprune.scoring import score

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
