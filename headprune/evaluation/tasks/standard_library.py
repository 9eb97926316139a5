"""The text of the running Python's standard library, split so that nothing leaks from one part into another."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "turtledemo"}
# Not prose and not programs: generated character tables, this machine's build settings, the topics as one escaped literal.
TABLES = ("encodings/", "_sysconfigdata", "pydoc_data/")
PART_SIZE = 400_000  # characters that the calibration and the test part each hold at least
LARGEST_HELD_OUT = 120_000  # larger packages are for training, so that the held-out parts hold many


@dataclass(frozen=True)
class Document:
    name: str  # path inside the library
    text: str


@dataclass(frozen=True)
class TextParts:
    """Disjoint parts: no package (or top-level module) has files in two of them."""

    training: tuple[Document, ...]
    calibration: tuple[Document, ...]
    test: tuple[Document, ...]


def standard_library_files() -> Iterator[tuple[str, Path]]:
    """(path inside the library, file) of every module of the standard library but its tests, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED & set(relative.parts):
            yield relative.as_posix(), path


def standard_library_text() -> TextParts:
    """Source files and the language reference of `pydoc_data.topics`, the same for the same Python every time.

    Whole packages go to a part, by a hash of their name, as the files of one package repeat each other. The topics quote
    one another and are for training alone.
    """
    packages: dict[str, list[Document]] = {}
    for document in source_documents():
        packages.setdefault(document.name.split("/")[0].removesuffix(".py"), []).append(document)
    test: list[Document] = []
    calibration: list[Document] = []
    training = topic_documents()
    for name in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        documents = packages[name]
        if size(documents) > LARGEST_HELD_OUT:
            training += documents
        elif size(test) < PART_SIZE:
            test += documents
        elif size(calibration) < PART_SIZE:
            calibration += documents
        else:
            training += documents
    return TextParts(tuple(training), tuple(calibration), tuple(test))


def source_documents() -> Iterator[Document]:
    """The source files that are UTF-8 text."""
    for name, path in standard_library_files():
        if name.startswith(TABLES):
            continue
        try:
            yield Document(name, path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue


def topic_documents() -> list[Document]:
    """What `help("for")` and the like print."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out of some slim distributions
        return []
    return [Document(f"pydoc_data/topics/{name}", topics[name]) for name in sorted(topics)]


def size(documents: Iterable[Document]) -> int:
    return sum(len(document.text) for document in documents)


def digest(documents: Iterable[Document]) -> str:
    """sha256 of names and texts, in order."""
    found = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            content = part.encode()
            found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()
