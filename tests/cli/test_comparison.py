"""`headprune compare`: the table in the terminal, as JSON and as Markdown."""

import json

import pytest
from command_line import only_error
from small_states import SmallStates
from tiny_models import bert

from headprune.surgery import save


@pytest.fixture
def dense(monkeypatch, tmp_path):
    monkeypatch.setattr("headprune.evaluation.tasks.build_task", lambda name, tokenizer, **_: SmallStates(tokenizer))
    save(bert(), tmp_path / "dense")


def test_compare_writes_the_table_and_keeps_the_rows(call, dense, tmp_path):
    arguments = ("compare", "./dense", "--methods", "heads,unstructured", "--steps", "0", "--repeats", "0", "--trials", "0")
    code, out, err = call(*arguments, "-o", "table.md")
    assert code == 0, err
    assert "heads, re-solved" in out
    assert "written to table.md" in out
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in rows[2:]] == ["| dense", "| heads, re-solved", "| weights"]
    assert {path.name for path in (tmp_path / "table.rows").iterdir()} >= {"dense.json", "heads.json", "unstructured.json"}
    code, out, err = call(*arguments, "-o", "table.md", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["heads"] == [8, 4]
    assert found["rows"][0]["parameters"] - found["rows"][1]["parameters"] == found["removed"]


def test_unknown_methods_and_fractions_are_one_line(call, dense, tmp_path):
    code, _, err = call("compare", "./dense", "--methods", "heads,chanels")
    assert code == 2
    assert "Did you mean 'channels'" in only_error(err)
    code, _, err = call("compare", "./dense", "--heads", "1.5")
    assert code == 2
    assert "heads is 1.5" in only_error(err)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize("output", ["table.json", "table", "table.rows"])
def test_a_table_is_written_to_a_markdown_file_alone(call, dense, tmp_path, output):
    code, _, err = call("compare", "./dense", "--methods", "heads", "-o", output)
    assert code == 2
    assert f"--output {output}: the table is written as Markdown; give a name that ends in .md" in only_error(err)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}
