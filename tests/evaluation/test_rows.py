import json

import pytest

from headprune.errors import InvalidInput
from headprune.evaluation.tasks.rows import read_rows, read_texts, without_a_tenth

ROWS = [{"text": 'one, "two"', "label": "1"}, {"text": "three\nlines\nlong", "label": "0"}]
WRITTEN = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
    "rows.json": json.dumps(ROWS),
    "rows.csv": 'text,label\n"one, ""two""",1\n"three\nlines\nlong",0\n',
    "rows.tsv": 'text\tlabel\none, ""two""\t1\n"three\nlines\nlong"\t0\n'.replace('one, ""two""', '"one, ""two"""'),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    path.write_text(WRITTEN[name])
    assert read_rows(str(path), ["text", "label"]) == ROWS
    assert read_texts(str(path), "text") == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", "", r"rows are read from \.jsonl, \.json, \.csv and \.tsv files"),
        ("rows.jsonl", "{", r"rows\.jsonl cannot be read as \.jsonl: "),
        ("rows.json", "{}", "expected a list of objects, found dict"),
        ("rows.jsonl", '{"text": "a"}\n{"words": "b"}\n', r"row 2: no 'text', only words\. Name the column"),
        ("rows.jsonl", '["a"]\n', r"row 1: no 'text', only \['a'\]"),
        ("rows.csv", "text\n", "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        read_rows(str(path), ["text"])


def test_files_that_are_missing_or_no_text_are_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"nowhere\.txt does not exist"):
        read_texts(str(tmp_path / "nowhere.txt"), "text")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidInput, match="cannot be read as UTF-8"):
        read_texts(str(tmp_path / "bytes.txt"), "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no \.txt or \.md files"):
        read_texts(str(tmp_path / "empty"), "text")


def test_a_folder_gives_its_texts_in_the_order_of_names(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("inner/c.txt", "third"), ("d.py", "none")):
        (tmp_path / name).write_text(text)
    assert read_texts(str(tmp_path), "text") == ["first", "second", "third"]


def test_a_tenth_is_held_out_the_same_every_time():
    rest, tenth = without_a_tenth(range(50))
    assert (rest, tenth) == without_a_tenth(range(50))
    assert len(tenth) == 5
    assert sorted(rest + tenth) == list(range(50))
    assert [len(part) for part in without_a_tenth([1, 2])] == [1, 1]
    with pytest.raises(InvalidInput, match="one example"):
        without_a_tenth([1])
