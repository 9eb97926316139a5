"""Encoder-decoders on one's own pairs of texts: translation, summaries, answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import placed
from headprune.evaluation.padding import refuse_without_padding
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.tasks.rows import Row, in_batches, parts_of, read_rows, refuse_counts, refuse_incomplete
from headprune.evaluation.tasks.target_tokens import Batch, TargetTokens, without_the_loss
from headprune.evaluation.tasks.task import register_task
from headprune.models.tokens import IGNORED_LABEL, decoder_of

PROMPT_ROWS = 4
TRANSLATION = "translation"


@register_task
class TextToText(TargetTokens):
    """Your own sources and targets for encoder-decoders (T5, BART, Marian): calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .jsonl, .json, .csv, .tsv or .parquet file, or rows on the Hub (owner/name:split), with the columns `source` and
    `target`; or, as the Hub has translations, with the column `translation`, {"de": text, "en": text}, with source=LANGUAGE and
    target=LANGUAGE (of two, one tells the other). test: the same; by default a tenth of calibration's rows, which then count for
    nothing else. training: the same, for recovery; by default the rows of calibration. prefix: is put before each source
    ("translate English to German: "). seed: which rows are drawn for calibration. Every token of a target is asked for with the
    true ones before it.
    """

    name = "text-to-text"
    more = "test=FILE (and test_rows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        calibration_rows: int = 256,
        test_rows: int | None = 1000,
        batch: int = 8,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_rows=calibration_rows, test_rows=test_rows, max_tokens=max_tokens, batch=batch)
        refuse_without_padding(tokenizer, f"task {self.name}")
        self.tokenizer, self.batch, self.max_tokens, self.prefix = tokenizer, batch, max_tokens, prefix
        columns = (source, target)

        def pairs(file: str) -> list[tuple[str, str]]:
            rows = read_rows(file, lambda first: (TRANSLATION,) if translated(first, columns) else columns)
            if not translated(rows[0], columns):
                return [(str(row[source]), str(row[target])) for row in rows]
            return [languages_of(row, columns, f"{file}, row {number}") for number, row in enumerate(rows, 1)]

        parts = parts_of(pairs, calibration, test, training, calibration_count=calibration_rows, test_count=test_rows, seed=seed)
        self.calibration, self.test = self.batches(parts.calibration), self.batches(parts.test)
        self.training_pairs = parts.training

    def batches(self, pairs: list[tuple[str, str]]) -> list[Batch]:
        return [self.encoded(some) for some in in_batches(pairs, self.batch)]

    def encoded(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        options: dict[str, Any] = {
            "padding": True, "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt",
            "return_attention_mask": True,
        }  # fmt: skip
        read = self.tokenizer([self.prefix + source for source, _ in pairs], **options)
        said = self.tokenizer(text_target=[target for _, target in pairs], **options)
        labels = said["input_ids"].masked_fill(said["attention_mask"] == 0, IGNORED_LABEL)
        return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}

    def training(self) -> list[Batch]:
        return self.batches(self.training_pairs)

    def check_model(self, model: nn.Module) -> None:
        name = type(model).__name__
        reads_text = getattr(model, "main_input_name", None) == "input_ids"
        if decoder_of(model) is None or not reads_text or not getattr(model, "can_generate", bool)():
            raise InvalidInput(f"task {self.name} needs an encoder-decoder of text with its head, as T5 or BART; {name} is none.")
        limit = position_limit(model)
        read = [*self.calibration, *self.test, *self.training_beyond(limit, self.max_tokens)]
        refuse_longer(read, limit, model)
        refuse_longer([{"input_ids": batch["labels"]} for batch in read], limit, model)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The labels go in too: the model itself makes what its decoder reads from them."""
        return model(**placed(model, batch), use_cache=False)

    def readout(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.asked(model, batch)[0]

    def asked(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.forward(model, batch).logits, batch["labels"]

    def latency_inputs(self) -> Batch:
        return without_the_loss(self.test[0], self.tokenizer.pad_token_id)

    def prompt(self) -> Batch:
        return {name: self.test[0][name][:PROMPT_ROWS] for name in ("input_ids", "attention_mask")}


def translated(row: Row, columns: tuple[str, str]) -> bool:
    """Whether the texts stand by their languages under `translation`, not in columns of their own."""
    return TRANSLATION in row and not row.keys() >= {*columns}


def languages_of(row: Row, named: tuple[str, str], place: str) -> tuple[str, str]:
    """(source, target) of a row of translations, by their languages; where one of two is named, the other one is what it is not.
    InvalidInput where that does not tell them: their order says nothing, the Hub's is that of the alphabet."""
    texts = row[TRANSLATION]
    if not isinstance(texts, dict):
        raise InvalidInput(f"{place}: {TRANSLATION!r} is {texts!r:.60}; expected an object with a text for each language.")
    left = [name for name in texts if name not in named]
    if len(texts) == 2 and len(left) == 1:
        source, target = named
        named = (left[0] if source == "source" else source, left[0] if target == "target" else target)
    if not texts.keys() >= {*named}:
        raise InvalidInput(
            f"{place}: the languages of {TRANSLATION!r} are {', '.join(texts)}; name the one that is read and the one that is "
            "asked for (source=LANGUAGE,target=LANGUAGE)."
        )
    refuse_incomplete(texts, named, place)
    return str(texts[named[0]]), str(texts[named[1]])
