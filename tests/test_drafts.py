"""What killed processes leave beside what they were writing, and what becomes of it."""

import pytest
from child_process import killed_at
from tiny_models import bert

from headprune import drafts
from headprune.errors import InvalidInput
from headprune.files import whole_file, whole_folder, write_text
from headprune.model_folder import PARTS, refuse_replacing
from headprune.surgery import load, save
from headprune.surgery.checkpoint import skeleton

WRITING = """
import os, sys, time
from headprune.files import whole_file, whole_folder
from headprune.model_folder import PARTS

def wait(*_):
    print("now", flush=True)
    time.sleep(600)

kind, target, call = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls, own = [], os.replace

def replace(source, destination):
    calls.append(destination)
    if len(calls) == call:
        wait()
    own(source, destination)

os.replace = replace
with whole_file(target) if kind == "file" else whole_folder(target, PARTS) as draft:
    file = draft if kind == "file" else draft / "config.json"
    file.write_text("new")
    if not call:
        wait()
"""


def killed_while_writing(kind, target, call=0):
    """call: before which of its renames; 0: before all."""
    killed_at("now", "-c", WRITING, kind, str(target), str(call))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    drafts.clear_away.cache_clear()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_was_writing_goes_with_the_next_write(tmp_path, kind):
    killed_while_writing(kind, tmp_path / "target")
    assert len(names(tmp_path)) == 1
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == ["other.txt"]


def test_what_another_process_is_writing_stays(tmp_path):
    with whole_file(tmp_path / "mine.txt") as draft:
        draft.write_text("mine")
        drafts.clear_away.cache_clear()
        write_text(tmp_path / "other.txt", "")
        assert draft.exists()
    assert names(tmp_path) == ["mine.txt", "other.txt"]


def model_folder(folder):
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_killed_replacement_is_ended_by_the_next_one_and_nothing_of_the_users_is_lost(tmp_path, call):
    """Its renames: the old folder aside, the new one in its place, the user's file back, and what is left of the old one away."""
    target = model_folder(tmp_path / "model")
    killed_while_writing("folder", target, call)
    assert target.exists() == (call != 2)
    with whole_folder(target, PARTS) as draft:
        (draft / "config.json").write_text("newer")
    assert names(tmp_path) == ["model"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "newer", "notes.txt": "mine"}


def test_what_a_killed_replacement_had_set_aside_is_there_before_the_place_is_asked_for(tmp_path):
    target = model_folder(tmp_path / "model")
    killed_while_writing("folder", target, 2)
    with pytest.raises(InvalidInput, match="holds a model that headprune did not write"):
        refuse_replacing(target)
    assert (target / "config.json").read_text() == "old"


def test_a_reader_is_told_where_the_old_model_is(tmp_path):
    save(bert(), tmp_path / "model")
    killed_while_writing("folder", tmp_path / "model", 2)
    (aside,) = tmp_path.glob(".headprune-old-*/model")
    for read in (load, skeleton):
        with pytest.raises(InvalidInput, match=f"model is no model folder: it does not exist. Give {aside}"):
            read(tmp_path / "model")
    load(aside)


def test_without_locks_nothing_is_taken_for_left(tmp_path, monkeypatch):
    killed_while_writing("file", tmp_path / "target")
    before = names(tmp_path)
    monkeypatch.setattr("headprune.drafts.lock", lambda handle: None)
    write_text(tmp_path / "other.txt", "")
    assert names(tmp_path) == sorted([*before, "other.txt"])
