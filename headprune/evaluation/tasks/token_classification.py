"""Classification of the words of one's own texts: names, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import Progress, placed
from headprune.evaluation.metric import Metric, ranked_first
from headprune.evaluation.padding import refuse_without_padding
from headprune.evaluation.perplexity import share
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.tasks.labelled import OfClasses
from headprune.evaluation.tasks.rows import in_batches, parts_of, read_rows, refuse_counts
from headprune.evaluation.tasks.target_tokens import Batch, TargetTokens
from headprune.evaluation.tasks.task import register_task
from headprune.models.tokens import IGNORED_LABEL

Sentence = tuple[list[str], list[str]]  # words, and a tag for each
OUTSIDE = "O"


@register_task
class TokenClassification(TargetTokens, OfClasses):
    """Classification of the words of your own texts: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .jsonl, .json or .parquet file, or rows on the Hub, with the columns `tokens`, a list of words (words=COLUMN for
    another), and `tags`, as many tags: names in the model's `config.label2id`, or numbers. A word's first token has its tag, the
    others have none; words behind `max_tokens` are cut off. test: the same; by default a tenth of calibration's rows, which then
    count for nothing else. training: the same, for recovery; by default the rows of calibration. seed: which rows are drawn for
    calibration.

    f1 (the headline) is of spans, as conlleval counts them (Tjong Kim Sang and De Meulder 2003): B-X begins one, I-X goes on with
    it; a tag of another form is a span of one word, O none. accuracy is of words. The loss of a sample is the mean over its words.
    """

    name = "token-classification"
    headline = "f1"
    higher_is_better = True
    more = "test=FILE (and test_rows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        words: str = "tokens",
        tags: str = "tags",
        calibration_rows: int = 512,
        test_rows: int | None = None,
        batch: int = 16,
        max_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_rows=calibration_rows, test_rows=test_rows, max_tokens=max_tokens, batch=batch)
        refuse_without_padding(tokenizer, f"task {self.name}")
        if not tokenizer.is_fast:
            raise InvalidInput(f"task {self.name} must know whose word a token is, which {type(tokenizer).__name__} does not tell.")
        self.tokenizer, self.batch, self.max_tokens, self.columns = tokenizer, batch, max_tokens, (words, tags)
        parts = parts_of(
            self.sentences, calibration, test, training, calibration_count=calibration_rows, test_count=test_rows, seed=seed
        )
        every = (*parts.calibration, *parts.test, *parts.training)
        self.names = sorted({tag for _, tags_of_one in every for tag in tags_of_one})
        self.calibration, self.test = self.batches(parts.calibration), self.batches(parts.test)
        self.training_rows = parts.training
        self.tag_of: dict[int, str] = {}

    def sentences(self, file: str) -> list[Sentence]:
        found = []
        for number, row in enumerate(read_rows(file, self.columns), 1):
            words, tags = (row[name] for name in self.columns)
            if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags) or not words:
                counts = [len(value) if isinstance(value, list) else "no list of" for value in (words, tags)]
                raise InvalidInput(
                    f"{file}, row {number}: {counts[0]} {self.columns[0]} and {counts[1]} {self.columns[1]}; expected a list of "
                    "words and as many tags."
                )
            found.append(([str(word) for word in words], [self.label_of(tag) for tag in tags]))
        return found

    def batches(self, sentences: Sequence[Sentence]) -> list[Batch]:
        """Labels are places in `names` until the model tells what these are."""
        return [self.encoded(some) for some in in_batches(sentences, self.batch)]

    def encoded(self, sentences: Sequence[Sentence]) -> Batch:
        found = self.tokenizer(
            [words for words, _ in sentences], is_split_into_words=True, padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        places = {name: place for place, name in enumerate(self.names)}
        labels = torch.full(found["input_ids"].shape, IGNORED_LABEL)
        for row, (_, tags) in enumerate(sentences):
            seen: set[int] = set()
            for token, word in enumerate(found.word_ids(row)):
                if word is not None and word not in seen:
                    seen.add(word)
                    labels[row, token] = places[tags[word]]
        return {**found, "labels": labels}

    def check_model(self, model: nn.Module) -> None:
        if "TokenClassification" not in type(model).__name__:
            raise InvalidInput(f"task {self.name} needs a model with such a head; {type(model).__name__} has none.")
        self.settle_all(model)
        limit, config = position_limit(model), cast(Any, model.config)
        refuse_longer([*self.calibration, *self.test, *self.training_beyond(limit, self.max_tokens)], limit, model)
        self.tag_of = {int(number): str(name) for number, name in config.id2label.items()}
        self.tag_of |= {number: name for name, number in self.settled().items() if not name.isdecimal()}

    def training(self) -> list[Batch]:
        return self.settle(self.batches(self.training_rows))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**placed(model, {name: value for name, value in batch.items() if name != "labels"}))

    def asked(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        self.settled()
        return self.forward(model, batch).logits, batch["labels"]

    @torch.inference_mode()
    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """An example is a row."""
        of_spans, of_words = [], []
        for done, batch in enumerate(self.test, 1):
            logits, labels = self.asked(model, batch)
            for told, wanted in zip(ranked_first(logits).cpu(), labels.cpu()):
                there = wanted != IGNORED_LABEL
                of_words.append([float((told == wanted)[there].sum()), float(there.sum())])
                found, true = (
                    spans([self.tag_of.get(number, OUTSIDE) for number in row[there].tolist()]) for row in (told, wanted)
                )
                of_spans.append([len(found & true), len(found), len(true)])
            if progress:
                progress(done, len(self.test))
        return {"f1": Metric(torch.tensor(of_spans), f1_of_spans), "accuracy": Metric(torch.tensor(of_words), share)}

    def latency_inputs(self) -> Batch:
        return {name: value for name, value in self.test[0].items() if name != "labels"}


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, word behind the last, kind) of each span."""
    found: set[tuple[int, int, str]] = set()
    begin, open_kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, dash, kind = tag.partition("-")
        goes_on = bool(dash) and mark == "I" and kind == open_kind
        if open_kind and not goes_on:
            found.add((begin, place, open_kind))
            open_kind = ""
        if dash and mark in ("B", "I") and not goes_on:
            begin, open_kind = place, kind
        elif not (dash and mark in ("B", "I")) and tag != OUTSIDE:
            found.add((place, place + 1, tag))
    return found


def f1_of_spans(rows: Tensor) -> float:
    """Columns: spans that are right, told, true. Where there are none at all, 1."""
    right, told, true = rows.sum(dim=0).tolist()
    return 2 * right / (told + true) if told + true else 1.0
