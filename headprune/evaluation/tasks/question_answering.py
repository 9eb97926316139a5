"""Answers that stand in a text: encoders with a head that points at where they begin and end."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import Progress, placed
from headprune.evaluation.metric import Metric, mean
from headprune.evaluation.padding import refuse_without_padding
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.tasks.rows import Row, in_batches, parts_of, read_rows, refuse_counts, refuse_incomplete
from headprune.evaluation.tasks.task import Task, register_task

Batch = dict[str, Tensor]
START, END = "start_positions", "end_positions"
PARAGRAPHS, QUESTIONS = "paragraphs", "qas"  # of SQuAD's own files, which nest questions in paragraphs, and these in articles
LONGEST = 30  # tokens of an answer, as in BERT's script
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Question:
    """answers: (text, where it begins in the context in characters); none where the context does not tell."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Window:
    """A question with a part of its context. inputs: what the tokenizer gives of it; places: token -> its (begin, end) in the
    context, None for what is not of it; answer: the first and the last token of the answer, 0 where it is not here."""

    of: int
    inputs: dict[str, list[int]]
    places: list[tuple[int, int] | None]
    answer: tuple[int, int]


@register_task
class QuestionAnswering(Task):
    """Answers that stand in your own texts, as in SQuAD: calibration=FILE, and test=FILE or a tenth of it.

    For models that point at where an answer begins and ends (...ForQuestionAnswering). calibration: a .jsonl, .json or .parquet
    file, or rows on the Hub (owner/name:split), with the columns `question`, `context` and `answers`: {"text": [...],
    "answer_start": [...]}, empty lists where the context does not tell (SQuAD 2); or a file as SQuAD's own, {"data":
    [{"paragraphs": [...]}, ...]}. test: the same; by default about a tenth of calibration's questions, all those of a context
    together, which then count for nothing else. training: the same, for recovery; by default the questions of calibration. Contexts
    of more than `max_tokens` (with the question) are read in windows that share `stride` tokens; a sample of scoring is a window.
    seed: which questions are drawn.

    f1 (the headline) and exact match, of SQuAD (Rajpurkar et al. 2016): words without case, articles and punctuation, the best of
    all answers. Of a question without an answer both say whether the model tells that there is none: that its first token scores
    more than all spans.
    """

    name = "question-answering"
    headline = "f1"
    higher_is_better = True
    more = "test=FILE (and test_rows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        calibration_rows: int = 256,
        test_rows: int | None = 1000,
        batch: int = 16,
        max_tokens: int = 384,
        stride: int = 128,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_rows=calibration_rows, test_rows=test_rows, max_tokens=max_tokens, batch=batch, stride=stride)
        if not tokenizer.is_fast:
            raise InvalidInput(
                f"task {self.name} must know where each token stands, which {type(tokenizer).__name__} does not tell."
            )
        refuse_without_padding(tokenizer, f"task {self.name}")
        self.tokenizer, self.batch, self.max_tokens, self.stride = tokenizer, batch, max_tokens, stride
        self.columns = (question, context, answers)
        parts = parts_of(
            self.questions, calibration, test, training, calibration_count=calibration_rows, test_count=test_rows, seed=seed,
            source=lambda one: one.context,
        )  # fmt: skip
        self.calibration = self.batches(self.windows(parts.calibration))
        self.asked, self.training_rows = parts.test, parts.training
        self.test_windows = self.windows(self.asked)
        self.test = self.batches(self.test_windows)

    def questions(self, file: str) -> list[Question]:
        rows = read_rows(file, lambda first: (PARAGRAPHS,) if PARAGRAPHS in first else self.columns)
        places = [(f"{file}, row {number}", row) for number, row in enumerate(rows, 1)]
        if PARAGRAPHS in rows[0]:
            places = [one for place, article in places for one in unnested(article, self.columns, place)]
        if not places:
            raise InvalidInput(f"{file} holds no questions.")
        return [self.question(row, place) for place, row in places]

    def question(self, row: Row, place: str) -> Question:
        asked, context, given = (row[name] for name in self.columns)
        answers = answers_of(given)
        if answers is None:
            raise InvalidInput(
                f"{place}: {self.columns[2]!r} is {given!r:.60}; expected as many texts as beginnings (whole numbers), "
                '{"text": ["Paris"], "answer_start": [17]}.'
            )
        for text, start in answers:
            if str(context)[start : start + len(text)] != text:
                raise InvalidInput(f"{place}: {text!r:.60} does not stand in the context at character {start}.")
        return Question(str(asked), str(context), answers)

    def windows(self, questions: Sequence[Question]) -> list[Window]:
        for one in questions:
            tokens = len(self.tokenizer(one.question, verbose=False)["input_ids"])
            if tokens + self.stride + 4 > self.max_tokens:
                raise InvalidInput(
                    f"the question {one.question!r:.60} has {tokens} tokens, windows share stride={self.stride}; expected fewer "
                    f"than max_tokens={self.max_tokens} in all. Give a larger max_tokens, or a smaller stride."
                )
        encoded = self.tokenizer(
            [one.question for one in questions], [one.context for one in questions], truncation="only_second",
            max_length=self.max_tokens, stride=self.stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        names = [name for name in encoded if name not in ("overflow_to_sample_mapping", "offset_mapping")]
        found = []
        for row, of in enumerate(encoded["overflow_to_sample_mapping"]):
            sides, offsets = encoded.sequence_ids(row), encoded["offset_mapping"][row]
            places = [tuple(place) if side == 1 else None for side, place in zip(sides, offsets)]
            inputs = {name: encoded[name][row] for name in names}
            found.append(Window(of, inputs, places, tokens_of_answer(questions[of], places)))
        return found

    def batches(self, windows: Sequence[Window]) -> list[Batch]:
        """Padded on the right, whatever the tokenizer does elsewhere: answers are told by the number of their tokens."""
        found = []
        for some in in_batches(windows, self.batch):
            padded = self.tokenizer.pad([one.inputs for one in some], padding_side="right", return_tensors="pt")
            first, last = torch.tensor([one.answer for one in some]).unbind(dim=1)
            found.append({**padded, START: first, END: last})
        return found

    def training(self) -> list[Batch]:
        return self.batches(self.windows(self.training_rows))

    def check_model(self, model: nn.Module) -> None:
        if "QuestionAnswering" not in type(model).__name__:
            raise InvalidInput(f"task {self.name} needs a model with such a head; {type(model).__name__} has none.")
        limit = position_limit(model)
        refuse_longer([*self.calibration, *self.test, *self.training_beyond(limit, self.max_tokens)], limit, model)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**placed(model, {name: value for name, value in batch.items() if name not in (START, END)}))

    def readout(self, model: nn.Module, batch: Batch) -> Tensor:
        """[windows, tokens, 2], how much each token is where the answer begins, and ends; 0 at padding."""
        output = self.forward(model, batch)
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return logits.masked_fill(batch["attention_mask"][..., None].to(logits.device) == 0, 0)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.readout(model, batch).float()
        unread = batch["attention_mask"].to(logits.device) == 0
        of_each = [
            F.cross_entropy(logits[..., side].masked_fill(unread, -torch.inf), batch[name].to(logits.device), reduction="none")
            for side, name in enumerate((START, END))
        ]
        return torch.stack(of_each).mean(dim=0)

    @torch.inference_mode()
    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """An example is a question."""
        best: list[tuple[float, str]] = [(-torch.inf, "")] * len(self.asked)
        nothing, numbers = [torch.inf] * len(self.asked), [True] * len(self.asked)
        windows = iter(self.test_windows)
        for done, batch in enumerate(self.test, 1):
            for logits in self.readout(model, batch).float().cpu():
                window = next(windows)
                best[window.of] = max(best[window.of], best_span(logits, window, self.asked[window.of].context))
                nothing[window.of] = min(nothing[window.of], float(logits[0].sum()))
                numbers[window.of] &= not bool(logits.isnan().any())
            if progress:
                progress(done, len(self.test))
        empty = any(not one.answers for one in self.asked)  # else each question has an answer, and the model need not tell
        told = ["" if empty and none > score else text for (score, text), none in zip(best, nothing)]
        rows = [
            scores_of(text, [answer for answer, _ in one.answers]) if known else (0.0, 0.0)  # NaN tells nothing, so it is wrong
            for text, one, known in zip(told, self.asked, numbers)
        ]
        exact, f1 = torch.tensor(rows).unbind(dim=1)
        return {"f1": Metric(f1, mean), "exact_match": Metric(exact, mean)}

    @torch.inference_mode()
    def outputs(self, model: nn.Module) -> Tensor:
        return self.readout(model, self.test[0])[:2].float()

    def latency_inputs(self) -> Batch:
        return {name: value for name, value in self.test[0].items() if name not in (START, END)}


def unnested(article: Row, columns: Sequence[str], place: str) -> Iterator[tuple[str, Row]]:
    """(where it stands, question with its context) of all questions in an article of SQuAD's own files."""
    question, context, answers = columns
    for inside, paragraph in listed(article, PARAGRAPHS, (context, QUESTIONS), place):
        for where, row in listed(paragraph, QUESTIONS, (question, answers), inside):
            yield where, {**row, context: paragraph[context]}


def listed(row: Row, name: str, columns: Sequence[str], place: str) -> Iterator[tuple[str, Row]]:
    """(where it stands, object) of each in the list `name` of `row`. InvalidInput where that is none, or lacks one of `columns`."""
    if not isinstance(row[name], list):
        raise InvalidInput(f"{place}: {name!r} is {row[name]!r:.60}; expected a list of objects, as in SQuAD's files.")
    for number, found in enumerate(row[name], 1):
        where = f"{place}, {name} {number}"
        refuse_incomplete(found, columns, where)
        yield where, found


def answers_of(given: Any) -> tuple[tuple[str, int], ...] | None:
    """(text, where it begins) of each answer, in lists by name or in a list of objects, as in SQuAD's own files; None for what is
    neither."""
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {name: [one.get(name) for one in given] for name in ("text", "answer_start")}
    texts, starts = (given.get("text"), given.get("answer_start")) if isinstance(given, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    found = tuple(zip(texts, starts))
    return found if all(isinstance(text, str) and isinstance(start, int) for text, start in found) else None


def tokens_of_answer(question: Question, places: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """(first, last) token of the first answer; (0, 0) where it is not wholly among `places`."""
    if not question.answers:
        return 0, 0
    text, begin = question.answers[0]
    end = begin + len(text)
    inside = [number for number, place in enumerate(places) if place and place[0] < end and place[1] > begin]
    read = [place for place in places if place]
    if not inside or not read or read[0][0] > begin or read[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def best_span(logits: Tensor, window: Window, context: str) -> tuple[float, str]:
    """(its score, its text) of the span of the context whose first and last token [tokens, 2] score most together."""
    tokens = len(window.places)
    outside = torch.tensor([place is None for place in window.places])
    begin, end = logits[:tokens].masked_fill(outside[:, None], -torch.inf).unbind(dim=1)
    allowed = torch.ones(tokens, tokens).triu().tril(LONGEST - 1).bool()
    scores = (begin[:, None] + end[None, :]).masked_fill(~allowed, -torch.inf)
    first, last = divmod(int(scores.argmax()), tokens)
    start, stop = window.places[first], window.places[last]
    if start is None or stop is None:  # a window without context
        return -torch.inf, ""
    return float(scores[first, last]), context[start[0] : stop[1]]


def scores_of(told: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of SQuAD, the best over `answers`."""
    found = [scores_of_one(words(told), words(answer)) for answer in answers or [""]]
    return max(exact for exact, _ in found), max(f1 for _, f1 in found)


def scores_of_one(told: list[str], answer: list[str]) -> tuple[float, float]:
    shared = sum((Counter(told) & Counter(answer)).values())
    if not told or not answer:
        return float(told == answer), float(told == answer)
    return float(told == answer), 2 * shared / (len(told) + len(answer))


def words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()
