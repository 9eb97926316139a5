"""Perplexity of a causal language model on the standard library's text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from headprune.evaluation.tasks.causal_text import CausalText, begun_windows, refuse_sizes
from headprune.evaluation.tasks.standard_library import Document, digest, standard_library_text
from headprune.evaluation.tasks.task import register_task
from headprune.evaluation.token_stream import token_stream

TRAINING_WINDOWS = 4096


@register_task
class StandardLibraryText(CausalText):
    """Next-token prediction on Python's own source text, over packages that neither training nor calibration saw.

    The documents of a part are joined (each behind the tokenizer's end-of-text token, where it has one) and cut into windows
    of `window` tokens that do not overlap, of which a seeded choice is used; each begins with the token that the tokenizer puts
    before every text, where it does.
    seed: which calibration windows are drawn; the test windows are always the same.
    """

    name = "standard-library-text"
    more = "test_windows"

    def __init__(
        self,
        tokenizer: Any,
        window: int = 256,
        batch: int = 8,
        calibration_windows: int = 128,
        test_windows: int = 160,
        seed: int = 0,
    ) -> None:
        refuse_sizes(window, batch)
        parts = standard_library_text()
        test = begun_windows(tokenizer, stream_of(tokenizer, parts.test), window, test_windows)
        known = stream_of(tokenizer, parts.calibration)
        super().__init__(tokenizer, begun_windows(tokenizer, known, window, calibration_windows, seed), test, batch)
        self.seed = seed
        self.digest = digest((*parts.calibration, *parts.test))[:16]

    def training(self) -> list[dict[str, Tensor]]:
        """Windows of the packages that neither calibration nor test holds."""
        stream = stream_of(self.tokenizer, standard_library_text().training)
        return self.batches(begun_windows(self.tokenizer, stream, self.window, TRAINING_WINDOWS, self.seed)) or self.calibration


def stream_of(tokenizer: Any, documents: Iterable[Document]) -> Tensor:
    return token_stream(tokenizer, (document.text for document in documents))
