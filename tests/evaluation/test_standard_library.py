import dataclasses

from tiny_library import use_tiny_library

from headprune.evaluation.tasks.standard_library import (
    LARGEST_HELD_OUT,
    PART_SIZE,
    digest,
    size,
    standard_library_files,
    standard_library_text,
)


def test_the_parts_share_no_package_and_no_text():
    parts = standard_library_text()
    packages, texts = [], []
    for documents in (parts.training, parts.calibration, parts.test):
        packages.append({document.name.split("/")[0] for document in documents})
        texts.append({document.text for document in documents if document.text.strip()})
    for held_out in (1, 2):
        assert not packages[held_out] & packages[0]
        assert not texts[held_out] & texts[0]
    assert not packages[1] & packages[2]
    assert not texts[1] & texts[2]


def test_the_parts_have_their_sizes_and_the_topics_are_for_training():
    parts = standard_library_text()
    for documents in (parts.calibration, parts.test):
        assert PART_SIZE <= size(documents) < PART_SIZE + LARGEST_HELD_OUT
        assert not any(document.name.startswith("pydoc_data") for document in documents)
    assert size(parts.training) > 10 * PART_SIZE
    assert any(document.name == "pydoc_data/topics/for" for document in parts.training)


def test_the_librarys_tests_and_tables_are_left_out(monkeypatch, tmp_path):
    use_tiny_library(monkeypatch, tmp_path)
    before = standard_library_text()
    for name in ("test/support.py", "package1/tests/more.py", "site-packages/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert len(list(standard_library_files())) == 48
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "cp1.py").write_text("table = 'abc'\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert standard_library_text() == before


def test_the_digest_is_of_every_name_and_character(monkeypatch, tmp_path):
    use_tiny_library(monkeypatch, tmp_path)
    documents = standard_library_text().training
    assert digest(standard_library_text().training) == digest(documents)
    first = documents[0]
    for changed in (
        dataclasses.replace(first, text=first.text + " "),
        dataclasses.replace(first, name="other.py"),
        dataclasses.replace(first, name=first.name + first.text[:1], text=first.text[1:]),
    ):
        assert digest((changed, *documents[1:])) != digest(documents)
