"""Retrieval with an embedder on one's own pairs of texts."""

from __future__ import annotations

from typing import Any

from headprune.evaluation.tasks.rows import parts_of, read_rows, refuse_counts
from headprune.evaluation.tasks.task import register_task
from headprune.evaluation.tasks.text_pairs import Pair, TextPairs


@register_task
class RetrievalOfPairs(TextPairs):
    """Retrieval over your own pairs of texts: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .jsonl, .json, .csv, .tsv or .parquet file, or rows on the Hub (owner/name:split), whose columns `query` and
    `document` hold texts that belong together; a document belongs to one query alone, and the others of its batch are wrong ones.
    test: the same; by default about a tenth of calibration's rows, all those of a document together, which then count for nothing
    else. training: the same, for recovery; by default the rows of calibration.
    pooling: mean (of a text's tokens), cls (the first one) or last; prompt, document_prompt: put before each query, each document.
    By default what sentence-transformers wrote beside the model, else mean, of causal decoders last, and no prompts. seed: which
    rows are drawn for calibration.
    """

    name = "retrieval"
    more = "test=FILE (and test_pairs, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        query: str = "query",
        document: str = "document",
        pooling: str | None = None,
        prompt: str | None = None,
        document_prompt: str | None = None,
        calibration_pairs: int = 384,
        test_pairs: int | None = None,
        batch: int = 32,
        max_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_pairs=calibration_pairs, test_pairs=test_pairs, max_tokens=max_tokens)

        def pairs(source: str) -> list[Pair]:
            return [Pair(str(row[query]), str(row[document])) for row in read_rows(source, [query, document])]

        parts = parts_of(
            pairs, calibration, test, training, calibration_count=calibration_pairs, test_count=test_pairs, seed=seed,
            source=lambda pair: pair.document,
        )  # fmt: skip
        super().__init__(
            tokenizer, parts.calibration, parts.test, parts.training, batch=batch, max_tokens=max_tokens, seed=seed,
            pooling=pooling, prompt=prompt, document_prompt=document_prompt,
        )  # fmt: skip
