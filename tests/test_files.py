"""What replaces folders and refuses places, whatever happens meanwhile."""

import errno
import json
import os
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from headprune.errors import HeadpruneError, InvalidInput
from headprune.evaluation.tasks.rows import file_rows
from headprune.files import finite, refuse_unwritable, whole_file, whole_folder, write_text
from headprune.planning import PruningPlan, Sensitivity
from headprune.planning.latency_table import LatencyTable
from headprune.scoring import HeadScores, Portraits
from headprune.sweep import Sweep


@pytest.mark.parametrize(("error", "told"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, HeadpruneError)])
@pytest.mark.parametrize("call", [1, 2])
def test_a_replacement_that_breaks_off_leaves_the_old_folder(tmp_path, monkeypatch, call, error, told):
    """call: which of the two renames."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    calls, own = [], os.replace

    def broken(source, destination):
        calls.append(destination)
        if len(calls) == call:
            raise error
        own(source, destination)

    monkeypatch.setattr("headprune.files.os.replace", broken)
    with pytest.raises(told), whole_folder(target) as draft:
        (draft / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_folders_that_were_made_for_what_failed_are_gone(tmp_path, whole):
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "mine" / "new" / "newer" / "model"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with suppress(KeyboardInterrupt), whole(tmp_path / "new" / "newer" / "model"):
        (tmp_path / "new" / "log").touch()  # of somebody else
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log", "mine", "new"]


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_on_the_disk_before_it_takes_its_place_unless_that_is_not_asked(tmp_path, monkeypatch, sync):
    done = []
    monkeypatch.setattr("headprune.files.os.fsync", lambda handle: done.append(("synced", os.readlink(f"/proc/self/fd/{handle}"))))
    own = os.replace
    monkeypatch.setattr(
        "headprune.files.os.replace", lambda draft, target: (done.append(("renamed", str(draft))), own(draft, target))
    )
    with whole_file(tmp_path / "plan.json", sync=sync) as draft:
        draft.write_text("{}")
    assert done == [("synced", str(draft))] * sync + [("renamed", str(draft))]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError("26 requested and 0 written"), r"the disk may be full \(26 requested and 0 written\)"),  # of numpy
    ],
)
def test_what_the_disk_refuses_is_told(tmp_path, error, told):
    message = rf"cannot write .*plan\.json: {told}\. Nothing was changed"
    with pytest.raises(HeadpruneError, match=message), whole_file(tmp_path / "plan.json"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def rights(path):
    return path.stat().st_mode & 0o777


def test_who_may_read_is_as_the_umask_says(tmp_path, umask):
    """Also of files by safetensors, which lets nobody else read them."""
    with whole_file(tmp_path / "weights") as draft:
        save_file({"one": torch.ones(1)}, draft)
    with whole_folder(tmp_path / "model") as draft:
        (draft / "inside").mkdir()
        save_file({"one": torch.ones(1)}, draft / "inside" / "weights")
    files, folders = [tmp_path / "weights", tmp_path / "model/inside/weights"], [tmp_path / "model", tmp_path / "model/inside"]
    assert [rights(path) for path in files] == [0o666 & ~umask] * 2
    assert [rights(path) for path in folders] == [0o777 & ~umask] * 2


def test_a_file_that_is_replaced_keeps_who_may_read_it(tmp_path):
    write_text(tmp_path / "plan.json", "old")
    (tmp_path / "plan.json").chmod(0o640)
    write_text(tmp_path / "plan.json", "new")
    assert rights(tmp_path / "plan.json") == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_file_stays_and_the_file_that_it_leads_to_is_written(tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "plan.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "plan.json")
    write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "disk" / "plan.json").read_text() == "new"
    assert [path.name for path in tmp_path.glob("*/*")] == ["plan.json"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_a_file_nested_too_deeply_is_named(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    for load in (PruningPlan.load, HeadScores.load, Sensitivity.load, LatencyTable.load, file_rows):
        with pytest.raises(InvalidInput, match=rf"{tmp_path}/plan.json cannot be read as .*: brackets are nested too deeply"):
            load(tmp_path / "plan.json")


def test_places_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    refuse_unwritable(tmp_path / "new" / "one", file=True)
    refuse_unwritable(tmp_path)
    with pytest.raises(InvalidInput, match="is a folder; give the name of a file"):
        refuse_unwritable(tmp_path, file=True)
    with pytest.raises(InvalidInput, match="is a file; give a folder"):
        refuse_unwritable(tmp_path / "file", file=False)
    with pytest.raises(InvalidInput, match="is a folder"):
        refuse_unwritable("/", file=True)


def test_devices_and_pipes_are_not_replaced_by_files(tmp_path):
    """Where one may write to /dev, a plan saved to /dev/null took its place, and every program then wrote into that file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "stdout", "link"):
        before = os.lstat(tmp_path / name)
        with pytest.raises(InvalidInput, match=f"{name} is a device or a pipe, which would be replaced"):
            refuse_unwritable(tmp_path / name)
        with pytest.raises(InvalidInput, match="is a device or a pipe"), whole_file(tmp_path / name):
            raise AssertionError("a draft was given")
        assert os.lstat(tmp_path / name) == before
    with pytest.raises(InvalidInput, match="/dev/null is a device or a pipe"):
        refuse_unwritable("/dev/null", file=True)


def test_json_has_null_where_a_number_is_not_finite():
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"), "x")}) == {"a": [1.0, None], "b": [None, "x"]}


@pytest.mark.parametrize("kind", [HeadScores, LatencyTable, Portraits, Sensitivity, Sweep])
def test_a_file_that_lacks_something_is_named(tmp_path, kind):
    path = tmp_path / "file.json"
    path.write_text("{}")
    with pytest.raises(InvalidInput, match="holds something else; expected a") as caught:
        kind.load(path)
    name = str(caught.value).removesuffix(" file.").rpartition(" ")[2]
    path.write_text(json.dumps({"kind": name, "schema_version": 1, "sites": {"a": [{}]}}))
    with pytest.raises(InvalidInput, match=rf"file\.json is not a complete {name} file: "):
        kind.load(path)
