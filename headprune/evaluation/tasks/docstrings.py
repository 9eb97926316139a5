"""The docstrings of the running Python's standard library, as pairs of first sentence (query) and rest (document)."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from headprune.evaluation.tasks.standard_library import standard_library_files
from headprune.evaluation.tasks.text_pairs import Pair

FIRST_SENTENCE = re.compile(r"(.+?[.!?])\s+(.+)")


def is_test_file(name: str) -> bool:
    """Half of all files, by a hash of their name, so that a file's text never stands on both sides."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def is_validation_file(name: str) -> bool:
    """Half of the files that are no test files, by another byte of the hash."""
    return hashlib.sha256(name.encode()).digest()[1] % 2 == 1


def docstring_pairs(validation: bool = False) -> tuple[list[Pair], list[Pair]]:
    """(calibration pairs, test pairs), split by file; no sentence and no rest stands twice in either or both.

    validation: the calibration pairs alone, split once more: (calibration pairs, validation pairs). For the choice of
    settings, which must not look at test pairs.
    """
    split: tuple[list[Pair], list[Pair]] = ([], [])
    seen: set[str] = set()
    for name, path in standard_library_files():
        for pair in pairs_in(path):
            if pair.query not in seen and pair.document not in seen:
                seen |= {pair.query, pair.document}
                if not validation:
                    split[is_test_file(name)].append(pair)
                elif not is_test_file(name):
                    split[is_validation_file(name)].append(pair)
    return split


def pairs_in(path: Path) -> Iterator[Pair]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        found = FIRST_SENTENCE.match(" ".join((ast.get_docstring(node) or "").split()))
        if found and 15 <= len(found[1]) <= 300 and len(found[2]) >= 40:
            yield Pair(found[1], found[2])
