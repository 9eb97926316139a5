"""Perplexity of a causal language model on one's own text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headprune.errors import InvalidInput
from headprune.evaluation.tasks.causal_text import CausalText, begun_windows, refuse_sizes
from headprune.evaluation.tasks.rows import TENTH, read_texts, refuse_counts, with_test
from headprune.evaluation.tasks.task import register_task
from headprune.evaluation.token_stream import token_stream


@register_task
class Text(CausalText):
    """Next-token prediction on your own text: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .txt or .md file, or a .jsonl, .json, .csv, .tsv or .parquet file, whose `column` holds documents, a folder of
    such, or a data set on the Hub (owner/name:split). test: the same, for the perplexity; by default the last tenth of
    calibration's tokens, which then count for nothing else. training: the same, for recovery; by default the text of calibration.
    Documents are joined, each behind the tokenizer's end-of-text token where it has one, and cut into windows of `window` tokens
    that do not overlap, of which a seeded choice is used; each begins with the token that the tokenizer puts before every text
    (Llama, Gemma), where it does. rows: "documents", or "lines" of one text, to be joined by blank
    lines, as the perplexity of WikiText is measured.
    """

    name = "text"
    more = "test=FILE, more text in calibration or a smaller window (and test_windows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        column: str = "text",
        rows: str = "documents",
        window: int = 512,
        batch: int = 4,
        calibration_windows: int = 128,
        test_windows: int = 160,
        training_windows: int = 4096,
        seed: int = 0,
    ) -> None:
        refuse_sizes(window, batch)
        if rows not in ("documents", "lines"):
            raise InvalidInput(f"rows={rows}; expected documents, or lines (of one text, as in WikiText).")
        refuse_counts(calibration_windows=calibration_windows, test_windows=test_windows, training_windows=training_windows)

        def texts(source: str) -> list[str]:
            found = read_texts(source, column)
            return ["\n\n".join(found)] if rows == "lines" else [text for text in found if text.strip()]

        def tokens(source: str) -> Tensor:
            return token_stream(tokenizer, texts(source))

        if training is not None:
            texts(training)  # refused before anything is scored; tokenised when it is wanted
        stream, held_out = with_test(tokens, calibration, test, training, without_the_last_tenth, nested=True)
        if min(len(stream), len(held_out)) < window:
            raise InvalidInput(
                f"task {self.name}: calibration has {len(stream)} tokens and test {len(held_out)}; expected at least one window of "
                f"{window} each. Give more text, or a smaller window."
            )
        super().__init__(
            tokenizer, begun_windows(tokenizer, stream, window, calibration_windows, seed),
            begun_windows(tokenizer, held_out, window, test_windows), batch,
        )  # fmt: skip
        self.stream, self.training_text, self.read = stream, training, tokens
        self.training_windows, self.seed = training_windows, seed

    def training(self) -> list[dict[str, Tensor]]:
        stream = self.stream
        if self.training_text is not None:
            stream = long_enough(self.read(self.training_text), self.training_text, self.window)
        return self.batches(begun_windows(self.tokenizer, stream, self.window, self.training_windows, self.seed))


def long_enough(stream: Tensor, source: str, window: int) -> Tensor:
    """`stream`, the tokens of `source` [tokens]. Raises InvalidInput where they fill no window."""
    if len(stream) < window:
        raise InvalidInput(
            f"training={source} has {len(stream)} tokens; expected at least one window of {window}. Give more text or a smaller "
            "window, or leave training out, for the text of calibration."
        )
    return stream


def without_the_last_tenth(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours are alike: held out is one piece."""
    rest = len(stream) - len(stream) // TENTH
    return stream[:rest], stream[rest:]
