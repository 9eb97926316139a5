"""Hidden folders beside a target: a draft of it is written in one, and what it replaces waits in another. They are locked by the
process that uses them, by which the next one knows what a killed one has left."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

DRAFT, OLD = ".headprune-draft-", ".headprune-old-"


@contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """An empty one in `parent`, which is gone after the block; so are, from the first on, those that killed processes have left."""
    clear_away(Path(os.path.abspath(parent)))
    with hidden_folder(parent, DRAFT) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hidden_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new one in `parent`, locked in the block."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        with locked(folder) as alone:
            if alone is not False and folder.exists():  # else another process took it for left, before it was locked
                yield folder
                return


@cache
def clear_away(parent: Path) -> None:
    """Removes the drafts in `parent` that killed processes have left; once in each process."""
    for folder in [*hidden(parent, DRAFT), *hidden(parent, OLD)]:
        with locked(folder) as alone:
            if alone and folder.name.startswith(DRAFT):
                shutil.rmtree(folder, ignore_errors=True)
            elif alone:
                with suppress(OSError):  # something waits there
                    folder.rmdir()


def discard(folder: Path) -> None:
    """Removes what was set aside; from the first moment on it counts as a draft, of which nothing is put back."""
    draft = folder.with_name(folder.name.replace(OLD, DRAFT))
    os.replace(folder, draft)
    shutil.rmtree(draft, ignore_errors=True)


def set_aside(target: Path) -> list[Path]:
    """What waits beside `target` under its name: killed processes have left it, or others are at it."""
    return [folder / target.name for folder in hidden(target.parent, OLD) if os.path.lexists(folder / target.name)]


def hidden(parent: Path, prefix: str) -> list[Path]:
    try:
        return sorted(parent / name for name in os.listdir(parent) if name.startswith(prefix))
    except OSError:
        return []


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Whether this process has `path` alone in the block; None where that cannot be known."""
    handle = None
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
    try:
        yield None if handle is None else lock(handle)
    finally:
        if handle is not None:
            os.close(handle)


def lock(handle: int) -> bool | None:
    """Whether the open file is now this process's, until it is closed or the process ends, however that ends; None where the system
    or the disk has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
