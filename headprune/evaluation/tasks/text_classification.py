"""Classification of one's own texts, or pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headprune.evaluation.padding import refuse_other_padding, refuse_without_padding
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.tasks.labelled import Example, Labelled
from headprune.evaluation.tasks.rows import parts_of, read_rows, refuse_counts
from headprune.evaluation.tasks.task import register_task


@register_task
class TextClassification(Labelled):
    """Classification of your own texts: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .jsonl, .json, .csv, .tsv or .parquet file, or rows on the Hub (owner/name:split), with the columns `text`,
    `label` and, for pairs of texts, `pair`. test: the same; by default a tenth of calibration's rows, which then count for nothing
    else. training: the same, for recovery; by default the rows of calibration. seed: which rows are drawn for calibration.
    """

    name = "text-classification"
    more = "test=FILE (and test_rows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        calibration_rows: int = 512,
        test_rows: int | None = None,
        batch: int = 16,
        max_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_rows=calibration_rows, test_rows=test_rows, max_tokens=max_tokens)
        refuse_without_padding(tokenizer, f"task {self.name}")
        columns = [text, label] if pair is None else [text, pair, label]

        def examples(source: str) -> list[Example]:
            return [
                (tuple(str(row[name]) for name in columns[:-1]), self.label_of(row[label])) for row in read_rows(source, columns)
            ]

        self.max_tokens = max_tokens
        parts = parts_of(examples, calibration, test, training, calibration_count=calibration_rows, test_count=test_rows, seed=seed)
        super().__init__(tokenizer, parts.calibration, parts.test, parts.training, batch)

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        limit = position_limit(model)
        refuse_longer(self.training_beyond(limit, self.max_tokens), limit, model)
        if self.batch > 1:
            refuse_other_padding(model, self.tokenizer)

    def inputs(self, examples: list[Any]) -> Mapping[str, Tensor]:
        columns = [list(column) for column in zip(*examples)]
        return dict(
            self.tokenizer(*columns, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt").items()
        )
