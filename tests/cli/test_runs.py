"""Commands over a whole run."""

import logging

import pytest
from command_line import only_error
from tiny_models import bert

from headprune.cli.runs import logged_to
from headprune.scoring import score


def test_report_writes_one_page_for_a_folder_of_scores(call, tmp_path):
    score(bert(), criterion="magnitude_l1").save("run/scores.json")
    code, out, err = call("report", "run", "-o", "page.html", "--figures", "plots")
    assert code == 0, err
    assert "written to page.html" in out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["heads-magnitude_l1.png", "heads-magnitude_l1.svg"]


def test_a_run_that_was_stopped_before_it_began_is_not_taken_for_another_s(tmp_path):
    """A model may be trained, and say so, before the run writes anything into a folder that is there already."""
    with logged_to(tmp_path):
        logging.getLogger("headprune").info("training a model")
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "recipe.yaml").write_text("")
        logging.getLogger("headprune").info("scoring")
    assert "scoring" in (tmp_path / "log.txt").read_text()


def test_the_log_takes_every_name(tmp_path, monkeypatch):
    """Whatever the locale's encoding is: the report reads it as UTF-8."""
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "ascii")
    monkeypatch.setattr(logging.getLogger("headprune"), "propagate", False)  # pytest-xdist cannot tell of such a name
    (tmp_path / "recipe.yaml").write_text("")
    with logged_to(tmp_path):
        logging.getLogger("headprune").info("taking up modèle/scores.json and \udcff")
    assert "taking up modèle/scores.json and \\udcff" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "minilm", "-o", "there"), "there is a folder; give the name of a file"),
        (("recover", "minilm", "--steps", "1", "-o", "letter.txt"), "letter.txt is a file; give a folder"),
        (("recover", "minilm", "--steps", "1", "-o", "."), "the folder that this runs in"),
        (("prune", "minilm", "plan.json", "-o", "things"), "things holds no model"),
        (("score", "minilm", "-o", "/"), "/ is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(call, tmp_path, arguments, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "letter.txt").write_text("")
    (tmp_path / "letter.txt").write_text("")
    code, _, err = call(*arguments)
    assert code == 2
    assert message in only_error(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "run/scores.json", "--heads", "0.5", "--model", "minilm"), "--model is given without --trials"),
        (("plan", "run/scores.json", "--heads", "0.5", "--table", "latency.json"), "--table is given without --latency"),
        (("evaluate", "minilm", "--stride", "8"), "--stride is given without --text"),
        (("evaluate", "minilm", "--limit", "8"), "--limit is given without --lm-eval"),
    ],
)
def test_options_that_would_not_be_read_are_refused(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert message in only_error(err)
