"""What is read back from a run's folder, and what is refused."""

import json
import shutil

import pytest
from reported_run import write_run
from tiny_models import bert

from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.report.run_folder import read_run
from headprune.scoring import score


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *write_run(folder)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "run")


def test_everything_in_the_folder_is_read(written):
    folder, scores, plan = written
    run = read_run(folder)
    assert list(run.scores) == ["fisher", "magnitude_l1"]
    assert run.ranking.to_json() == scores["fisher"].to_json()
    assert run.plan.keep == plan.keep
    assert run.comparison.ratio("latency_p50_ms") == 0.75
    assert set(run.checks) == {"cut_equals_gated", "reload"}
    assert len(run.sweep["points"]) == 2
    assert set(run.portraits) == set(run.sensitivity.curves) == set(plan)
    assert "</script>" in run.log


def test_scores_alone_are_a_run(folder):
    for path in folder.iterdir():
        if path.name != "scores.json":
            path.unlink()
    run = read_run(folder)
    assert run.plan is run.comparison is run.sweep is None
    assert run.shapes == run.ranking.shapes


def test_values_of_another_model_are_refused(folder):
    score(bert(), criterion="random").save(folder / "scores-random.json")
    with pytest.raises(InvalidInput, match="scores by random are of another model"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", b"task: retrieval", r"recipe\.yaml: task is 'retrieval'; expected a section, task\.key: value"),
        ("recipe.yaml", b"model: m\nplan: [1]", r"recipe\.yaml: plan is \[1\]; expected a section"),
        ("recipe.yaml", b"\xff\xfe", r"recipe\.yaml is not YAML: 'utf-8' codec"),
        ("sweep.json", None, r"sweep\.json is not a complete sweep file: .*latency_p50_ms"),
    ],
)
def test_files_edited_by_hand_are_refused_by_name(folder, name, content, message):
    if content is None:
        found = json.loads((folder / name).read_text())
        del found["points"][1]["evaluation"]["latency_p50_ms"]
        content = json.dumps(found).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_run(folder)


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"neither scores\.json nor plan\.json"):
        read_run(tmp_path)
    with pytest.raises(InvalidInput, match="is no folder"):
        read_run(tmp_path / "none")


def test_an_incomplete_or_newer_result_is_refused(folder):
    content = json.loads((folder / "result.json").read_text())
    del content["comparison"]["dense"]["parameters"]
    (folder / "result.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=r"result\.json is not a complete run_result"):
        read_run(folder)
    (folder / "result.json").write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(CorruptCheckpoint, match="schema version 99"):
        read_run(folder)
