"""Ctrl-C or SIGTERM in the middle of a run, by a real signal to a real process: the same command goes on from there."""

import json
import signal
from pathlib import Path

import child_process
import pytest
from letter_tokenizer import letter_tokenizer
from small_states import SmallStates
from tiny_models import bert

from headprune.evaluation.tasks import register_task
from headprune.surgery import save

SCRIPT = Path(child_process.__file__).with_name("interrupted_run.py")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_goes_on_where_it_was(call, number, code):
    save(bert(), "dense", tokenizer=letter_tokenizer())
    recipe = {"model": "./dense", "task": {"name": SmallStates.name}, "output": "run", "evaluate": {"repeats": 1}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    ended, err = child_process.signalled_at("re-solving", number, str(SCRIPT), "run", "recipe.yaml")
    assert ended == code
    assert err.splitlines()[-1] == "stopped; nothing is half-written, and a run goes on from here with the same command"
    assert "Traceback" not in err
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "inputs.json",
        "log.txt",
        "plan.json",
        "recipe.yaml",
        "scores.json",
    ]
    scored = Path("run/scores.json").stat().st_mtime_ns
    register_task(SmallStates)
    code, out, err = call("run", "recipe.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["checks"]["reload"] == 0
    assert Path("run/scores.json").stat().st_mtime_ns == scored
    assert "score heads" not in err
    assert "taking up run/plan.json" in Path("run/log.txt").read_text()
