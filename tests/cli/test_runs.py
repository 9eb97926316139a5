"""Commands over a whole run."""

from tiny_models import bert

from headprune.scoring import score


def test_report_writes_one_page_for_a_folder_of_scores(call, tmp_path):
    score(bert(), criterion="magnitude_l1").save("run/scores.json")
    code, out, err = call("report", "run", "-o", "page.html", "--figures", "plots")
    assert code == 0, err
    assert "written to page.html" in out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["heads-magnitude_l1.png", "heads-magnitude_l1.svg"]
