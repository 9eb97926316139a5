"""Files and folders that are either written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from headprune.arguments import is_path, refuse_impossible
from headprune.drafts import OLD, discard, draft_folder, hidden_folder, lock, locked, set_aside
from headprune.errors import CorruptCheckpoint, HeadpruneError, InvalidInput

SCHEMA_VERSION = 1
_DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file would be too large"}


def path_of(given: Any) -> Path:
    """`given` as a path. InvalidInput where it is none."""
    if not is_path(given):
        raise InvalidInput(f"the path is {given!r:.80}; expected the name of a file.")
    refuse_impossible("the path", given)
    return Path(given)


@contextmanager
def whole_folder(target: str | os.PathLike[str], parts: Sequence[str] | None = None) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes `target`'s place when the block ends well. parts: patterns of what
    belongs to it; then all else that was in `target` stays there.

    A failure (a full disk too) leaves `target` as it was and nothing else behind; HeadpruneError says what happened.
    """
    target = Path(target)
    with clear_disk_errors(target):
        if target.exists() and not target.is_dir():
            raise InvalidInput(f"{target} is a file; give a folder to write to.")
        with parent_made(target) as parent, draft_folder(parent) as place:
            draft = place / "draft"
            draft.mkdir()
            yield draft
            rights = draft.stat().st_mode & 0o666
            for path in draft.rglob("*"):  # safetensors lets nobody else read its files
                if path.is_file():
                    path.chmod(rights)
            replace_folder(draft, target, parts)


def replace_folder(draft: Path, target: Path, parts: Sequence[str] | None = None) -> None:
    put_back(target, parts)
    if not os.path.lexists(target):
        os.replace(draft, target)
        return
    with hidden_folder(target.parent, OLD) as aside:
        old = aside / target.name
        try:
            os.replace(target, old)
            os.replace(draft, target)
        except BaseException:  # Ctrl-C too
            if not os.path.lexists(target):
                os.replace(old, target)
            if not any(aside.iterdir()):
                aside.rmdir()
            raise
        let_go(old, target, parts)


def put_back(target: Path, parts: Sequence[str] | None = None) -> None:
    """Ends what a killed process began when it replaced `target`: what was there is there again, unless the new one is already."""
    for old in set_aside(target):
        with clear_disk_errors(target), locked(old.parent) as alone:
            if alone and os.path.lexists(target):
                let_go(old, target, parts)
            elif alone:
                os.replace(old, target)
                old.parent.rmdir()


def let_go(old: Path, target: Path, parts: Sequence[str] | None) -> None:
    """Removes what `target` has replaced; parts: as in `whole_folder`."""
    if parts is not None and not old.is_symlink():  # where a link led to, all stays
        take_along(old, target, parts)
    discard(old.parent)


def take_along(old: Path, target: Path, parts: Sequence[str]) -> None:
    """Moves what is in `old` to `target`, unless it is there already or one of `parts`."""
    for path in sorted(old.iterdir()):
        if not any(fnmatchcase(path.name, part) for part in parts) and not os.path.lexists(target / path.name):
            try:
                os.replace(path, target / path.name)
            except OSError as error:
                raise HeadpruneError(
                    f"{target} is written, but {path.name}, which was there before, could not be moved back: {error.strerror}. "
                    f"It is in {old}."
                ) from error


@contextmanager
def whole_file(target: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """An empty file beside `target` to write into, which takes `target`'s place when the block ends well: a killed run
    leaves the old one or the new one. A failure leaves `target` as it was; HeadpruneError says what happened. Of a link it is the
    file that it leads to.

    sync: wait until the disk has it, so that a machine that goes down leaves the old or the new one too."""
    given = path_of(target)
    refuse_device(given)
    target = Path(os.path.realpath(given))
    with clear_disk_errors(given), parent_made(target) as parent, draft_folder(parent) as place:
        draft = place / "draft"
        draft.touch()
        rights = (target if target.exists() else draft).stat().st_mode & 0o777
        yield draft
        if sync:
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        draft.chmod(rights)  # safetensors lets nobody else read its files
        os.replace(draft, target)


@contextmanager
def parent_made(target: Path) -> Iterator[Path]:
    """The folder of `target`, made where it is missing; where the block fails, what was made is gone again if it is empty."""
    missing = [folder for folder in target.parents if not os.path.lexists(folder)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target.parent
    except BaseException:  # Ctrl-C too
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def refuse_unwritable(target: str | os.PathLike[str], *, file: bool | None = None) -> None:
    """InvalidInput where nothing could be written to `target`, which need not be there yet: a file, a folder or (None) either."""
    target = path_of(target)
    refuse_device(target)
    if os.path.exists(target) and file is target.is_dir():
        raise InvalidInput(f"{target} is a {'folder; give the name of a file' if file else 'file; give a folder'} to write to.")
    # os.path: where a folder on the way may not be read, Path.exists raises before Python 3.14.
    where = target.absolute() if os.path.isdir(target) else Path(os.path.realpath(target))  # a link to a file leads there
    place = next((folder for folder in where.parents if os.path.exists(folder)), where)
    if not place.is_dir():
        raise InvalidInput(f"cannot write {target}: {place} is a file, not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InvalidInput(f"cannot write {target}: you may not write into {place}.")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """In the block no other process may be in `folder` so, which is made where it is missing: InvalidInput. The lock ends with the
    process, however that ends; a system or disk without locks refuses nothing."""
    place = folder / ".lock"
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if lock(handle) is False:
            raise InvalidInput(f"another process is at work in {folder}; wait until it is done, or give another folder.")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)
    finally:
        os.close(handle)


def refuse_device(target: Path) -> None:
    """InvalidInput where `target` is a device or a pipe: a file would take the place of /dev/null for all programs, where one may
    write there. /dev/stdout is a link to what the process has open."""
    device = os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target)
    if device or (os.path.islink(target) and os.readlink(target).startswith("/proc/")):
        raise InvalidInput(f"{target} is a device or a pipe, which would be replaced; give the name of a file.")


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes a file as `whole_file` does."""
    with whole_file(target) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(target: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Writes {"kind", "schema_version", **content}; floats are kept to the last bit."""
    document = {"kind": kind, "schema_version": SCHEMA_VERSION, **content}
    write_text(target, json.dumps(document, indent=1) + "\n")


def finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(source: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """What `write_json` wrote. Raises InvalidInput where the file is missing or not JSON of this kind, CorruptCheckpoint
    where it was written by a newer schema."""
    source = path_of(source)
    try:
        document = parsed_json(source.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from None
    except FileNotFoundError:
        raise InvalidInput(f"{source} does not exist; expected a {kind} file (JSON).") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{source} cannot be read as a {kind} file (JSON): {error}.") from None
    content: dict[str, Any] = document if isinstance(document, dict) else {}
    found = content.get("kind")
    if found != kind:
        raise InvalidInput(f"{source} holds {found or 'something else'}; expected a {kind} file.")
    version = content.get("schema_version")
    if type(version) is not int or version < 1:
        raise InvalidInput(f"{source}: schema_version is {version!r}; expected {SCHEMA_VERSION}, as headprune writes it.")
    if version > SCHEMA_VERSION:
        raise CorruptCheckpoint(
            f"{source} has schema version {version}; this headprune reads up to {SCHEMA_VERSION}. Update headprune to read it."
        )
    return content


def parsed_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`, with a ValueError also where brackets are nested so deeply that it gives up."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """InvalidInput where a file edited by hand names something twice; json would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted({name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1})
        raise InvalidInput(f"{', '.join(twice)} stands in the file twice.")
    return found


@contextmanager
def clear_disk_errors(target: Path) -> Iterator[None]:
    """Turns the operating system's refusals (and safetensors' wrapping of them) into one clear line about `target`."""
    try:
        yield
    except OSError as error:
        # numpy tells no number where the disk took a part alone.
        told = f"the disk may be full ({error})" if error.errno is None else os.strerror(error.errno)
        raise HeadpruneError(f"cannot write {target}: {_DISK.get(error.errno or 0, told)}. Nothing was changed there.") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise HeadpruneError(f"cannot write {target}: {error}. Nothing was changed there.") from error
        raise
