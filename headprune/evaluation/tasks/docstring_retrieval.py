"""Retrieval with a sentence encoder: the first sentence of a docstring finds the rest of it."""

from __future__ import annotations

import hashlib
from typing import Any

from headprune.evaluation.tasks.docstrings import docstring_pairs
from headprune.evaluation.tasks.rows import shuffled
from headprune.evaluation.tasks.task import register_task
from headprune.evaluation.tasks.text_pairs import TextPairs


@register_task
class DocstringRetrieval(TextPairs):
    """First sentence of a docstring -> the rest of it, over this Python's standard library.

    validation: tests on files out of the calibration half, and calibrates on the rest of it.
    seed: which of the calibration pairs are drawn, and in what order; the test pairs are always the same.
    """

    name = "docstring-retrieval"
    more = "test_pairs"

    def __init__(
        self,
        tokenizer: Any,
        calibration_pairs: int = 384,
        test_pairs: int = 600,
        batch: int = 32,
        max_tokens: int = 96,
        validation: bool = False,
        seed: int = 0,
    ) -> None:
        calibration, test = docstring_pairs(validation)
        test, drawn = shuffled(test)[:test_pairs], shuffled(calibration, seed)
        super().__init__(tokenizer, drawn[:calibration_pairs], test, drawn, batch=batch, max_tokens=max_tokens, seed=seed)
        self.digest = hashlib.sha256(repr(self.test).encode()).hexdigest()[:16]
