import csv
import gzip
import json

import pytest
from huggingface_hub import constants

from headprune.errors import InvalidInput
from headprune.evaluation.tasks import other_rows
from headprune.evaluation.tasks.rows import parts_of, read_rows, read_texts, refuse_counts, refuse_same, without_a_tenth

ROWS = [{"text": 'one, "two"', "label": "1"}, {"text": "three\nlines\nlong", "label": "0"}]
WRITTEN = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
    "rows.ndjson": "\n".join(map(json.dumps, ROWS)),
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
        ("rows.xml", "", r"rows are read from \.jsonl, \.json, \.csv, \.tsv and \.parquet files; convert it"),
        ("rows.parquet", "PAR", r"rows\.parquet cannot be read as Parquet: "),
        ("rows.csv.gz", "text\n", r"rows\.csv\.gz cannot be read as UTF-8 text: Not a gzipped file"),
        ("rows.jsonl", "{", r"rows\.jsonl cannot be read as \.jsonl: "),
        ("rows.json", "{}", "expected a list of objects, found dict"),
        ("rows.jsonl", '{"text": "a"}\n{"words": "b"}\n', r"row 2: no 'text', only words\. Name the column"),
        ("rows.jsonl", '["a"]\n', r"row 1: \['a'\] is no object; expected one with 'text'"),
        ("rows.jsonl", '{"text": null}\n', r"row 1 has no value for 'text'; give one, or leave the row out"),
        ("rows.csv", "label,text\n1,a\n0\n", r"row 2 has no value for 'text'"),
        ("rows.csv", "text,label\none, two,1\n", r"row 1 has more fields than the header; .* stand in quotes"),
        ("rows.csv", "text\n", "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        read_rows(str(path), ["text"])


@pytest.mark.parametrize("name", WRITTEN)
def test_packed_files_are_read_as_others(tmp_path, name):
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(WRITTEN[name].encode()))
    assert read_rows(str(tmp_path / f"{name}.gz"), ["text", "label"]) == ROWS
    (tmp_path / "a text.txt.gz").write_bytes(gzip.compress(b"one"))
    assert read_texts(str(tmp_path / "a text.txt.gz"), "text") == ["one"]


def test_lines_of_objects_may_be_called_json_as_those_of_c4_are(tmp_path):
    (tmp_path / "rows.json").write_text(WRITTEN["rows.jsonl"])
    assert read_rows(str(tmp_path / "rows.json"), ["text"]) == ROWS
    (tmp_path / "rows.json").write_text(json.dumps({"data": ROWS}, indent=1))
    assert read_rows(str(tmp_path / "rows.json"), ["text"]) == ROWS


def test_parquet_files_are_read_with_what_is_nested_in_them(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    rows = [{**row, "answers": {"text": ["a", "b"], "answer_start": [0, 1]}, "messages": [{"role": "user"}]} for row in ROWS]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet"), ["text"]) == rows
    with pytest.raises(InvalidInput, match=r"nowhere\.parquet does not exist"):
        read_rows(str(tmp_path / "nowhere.parquet"), ["text"])


def test_a_name_on_the_hub_is_read_by_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read_rows("owner/a-set:train", ["text"]) == ROWS
    assert read_texts("owner/a-set:form-v1:train[:2]", "text") == [row["text"] for row in ROWS]
    assert asked == [("owner/a-set", None, "train"), ("owner/a-set", "form-v1", "train[:2]")]
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "a:set.txt").write_text("a file")
    assert read_texts("owner/a:set.txt", "text") == ["a file"]


def test_what_datasets_cannot_give_is_told(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match=r"datasets cannot read owner/none:train: .* HF_HUB_OFFLINE=0 lets it be fetched"):
        read_rows("owner/none:train", ["text"])
    monkeypatch.setattr(other_rows, "find_spec", lambda package: None)
    with pytest.raises(InvalidInput, match=r"owner/none:train names a data set on the Hub, which datasets reads: pip install"):
        read_rows("owner/none:train", ["text"])


def test_files_that_are_missing_or_no_text_are_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"nowhere\.txt does not exist"):
        read_texts(str(tmp_path / "nowhere.txt"), "text")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidInput, match="cannot be read as UTF-8"):
        read_texts(str(tmp_path / "bytes.txt"), "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no \.txt, \.md, .*\.csv or \.tsv files"):
        read_texts(str(tmp_path / "empty"), "text")


def test_a_folder_gives_its_texts_in_the_order_of_names(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("inner/c.txt", "third"), ("d.py", "none")):
        (tmp_path / name).write_text(text)
    assert read_texts(str(tmp_path), "text") == ["first", "second", "third"]


def test_a_folder_without_texts_gives_the_rows_of_its_files(tmp_path):
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text(WRITTEN[name])
    (tmp_path / "rows.arrow").write_bytes(b"ARROW1")
    assert read_texts(str(tmp_path), "text") == [row["text"] for row in ROWS] * 2


@pytest.mark.parametrize(("name", "way_out"), [("rows.arrow", r'load_dataset\("arrow"'), ("rows.jsonl.zst", "unpack it first")])
@pytest.mark.parametrize("read", [read_texts, read_rows])
def test_packed_data_is_refused_with_a_way_out_and_not_taken_for_text(tmp_path, read, name, way_out):
    (tmp_path / name).write_text(WRITTEN["rows.jsonl"])
    with pytest.raises(InvalidInput, match=rf"{name}: rows are read from .*; .*{way_out}"):
        read(str(tmp_path / name), "text")


def test_a_tenth_is_held_out_the_same_every_time():
    rest, tenth = without_a_tenth(range(50))
    assert (rest, tenth) == without_a_tenth(range(50))
    assert len(tenth) == 5
    assert sorted(rest + tenth) == list(range(50))
    assert [len(part) for part in without_a_tenth([1, 2])] == [1, 1]
    with pytest.raises(InvalidInput, match="one example"):
        without_a_tenth([1])


def test_examples_of_one_source_stay_on_one_side():
    items = [(number, number // 7) for number in range(100)]
    rest, tenth = without_a_tenth(items, source=lambda item: item[1])
    assert sorted(rest + tenth) == items
    assert not {source for _, source in rest} & {source for _, source in tenth}
    assert 10 <= len(tenth) < 17
    with pytest.raises(InvalidInput, match="of one text"):
        without_a_tenth([1, 2, 3], source=lambda _: "the same")


def test_parts_are_drawn_by_the_seed_but_for_the_test(tmp_path):
    files = {"calibration": list(range(50)), "other": list(range(100, 140))}
    counts = {"calibration_count": 20, "test_count": 3}
    found = parts_of(files.get, "calibration", None, None, seed=1, **counts)
    again = parts_of(files.get, "calibration", None, None, seed=2, **counts)
    assert (len(found.calibration), len(found.test), len(found.training)) == (20, 3, 45)
    assert found.test == again.test
    assert found.calibration != again.calibration
    assert found.calibration == found.training[:20]
    assert not set(found.test) & set(found.training)
    named = parts_of(files.get, "calibration", "other", None, seed=1, calibration_count=20, test_count=None)
    assert (len(named.training), named.test) == (50, files["other"])
    taught = parts_of(files.get, "calibration", None, "other", seed=1, **counts)
    assert (sorted(taught.training), taught.test) == (files["other"], found.test)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_mark_before_the_text_is_not_part_of_it(tmp_path, name):
    path = tmp_path / name
    path.write_text(WRITTEN[name], encoding="utf-8-sig")
    assert read_rows(str(path), ["text", "label"]) == ROWS


def test_what_unicode_calls_line_separators_may_stand_in_a_text(tmp_path):
    texts = ["one\u2028two", "three\x85four\x0cfive"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts), "utf-8")
    for name in ("rows.jsonl", "rows.csv"):
        assert read_texts(str(tmp_path / name), "text") == texts


def test_a_document_in_a_table_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(f"text\n{'long ' * 40_000}\n")
    assert len(read_texts(str(tmp_path / "rows.csv"), "text")[0]) == 200_000
    assert csv.field_size_limit() == limit


def test_names_in_capitals_are_read_and_commas_at_the_end_of_a_row_are_nothing(tmp_path):
    (tmp_path / "ROWS.CSV").write_text(",text\n0,a,,\n1,b\n")
    (tmp_path / "A.TXT").write_text("c")
    assert read_texts(str(tmp_path / "ROWS.CSV"), "text") == ["a", "b"]
    assert read_texts(str(tmp_path), "text") == ["c"]


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.txt").write_text("a")
    assert read_texts("~/own.txt", "text") == ["a"]


def test_test_data_that_were_learnt_from_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in ("a.txt", "b.txt", "folder/c.txt"):
        (tmp_path / path).write_text("a")
    a, b, folder = (str(tmp_path / name) for name in ("a.txt", "b.txt", "folder"))
    refuse_same(a, b, folder)
    refuse_same(a, None, a)
    for calibration, test, training in ((a, a, None), (b, a, a), (folder, f"{folder}/c.txt", None)):
        with pytest.raises(InvalidInput, match="quality would be measured on what was learnt from"):
            refuse_same(calibration, test, training, nested=True)
    refuse_same(folder, f"{folder}/c.txt")  # images: folders of classes lie beside each other


def test_counts_below_one_are_refused():
    refuse_counts(test_rows=None, calibration_rows=1)
    with pytest.raises(InvalidInput, match="test_rows=-1; expected at least 1"):
        refuse_counts(test_rows=-1)
