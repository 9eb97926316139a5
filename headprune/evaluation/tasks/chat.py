"""Language models on one's own conversations: what they answer, not what they are asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from headprune.errors import InvalidInput
from headprune.evaluation.data import placed
from headprune.evaluation.perplexity import refuse_other_models
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.tasks.rows import Row, in_batches, parts_of, read_rows, refuse_counts
from headprune.evaluation.tasks.target_tokens import Batch, TargetTokens
from headprune.evaluation.tasks.task import register_task
from headprune.models.tokens import IGNORED_LABEL

Turn = Mapping[str, Any]
ROLE, CONTENT, ANSWERS = "role", "content", "assistant"
FROM, VALUE, ROLES = "from", "value", {"human": "user", "gpt": ANSWERS}  # of ShareGPT's turns
MESSAGES, ALPACA = "messages", ("instruction", "output")
FORMS = (("conversations",), ALPACA, ("prompt", "completion"))  # columns that are looked for where there are no messages
log = logging.getLogger("headprune")


@register_task
class Chat(TargetTokens):
    """Answers in your own conversations, for language models: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .jsonl or .json file whose column `messages` (or ShareGPT's `conversations`) holds the turns, {"role": "user" |
    "assistant" | ..., "content": text} or {"from": "human" | "gpt" | ..., "value": text}; or any file of rows with `instruction`,
    perhaps `input`, and `output` (Alpaca), with `prompt` and `completion`, or with other names for these, prompt=COLUMN and
    answer=COLUMN. The first row tells which. Turns are written as the tokenizer's chat template says; without one, a
    prompt and its answer follow each other, with the end-of-text token behind. test: the same; by default a tenth of calibration's
    rows, which then count for nothing else. training: the same, for recovery; by default the rows of calibration. seed: which rows
    are drawn for calibration.

    Asked for are the tokens of a conversation's last answer, what stands before it is context. Conversations are cut behind
    `max_tokens`; those whose last answer begins only there are left out.
    """

    name = "chat"
    more = "test=FILE (and test_rows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        messages: str = "messages",
        prompt: str | None = None,
        answer: str | None = None,
        calibration_rows: int = 256,
        test_rows: int | None = 500,
        batch: int = 4,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_rows=calibration_rows, test_rows=test_rows, max_tokens=max_tokens, batch=batch)
        if (prompt is None) != (answer is None):
            raise InvalidInput(f"prompt={prompt}, answer={answer}: expected both columns, or neither for a column of messages.")
        self.tokenizer, self.batch, self.max_tokens = tokenizer, batch, max_tokens
        self.messages, self.pair = messages, None if prompt is None or answer is None else (prompt, answer)
        parts = parts_of(
            self.conversations, calibration, test, training, calibration_count=calibration_rows, test_count=test_rows, seed=seed
        )
        self.calibration, self.test = self.batches(parts.calibration), self.batches(parts.test)
        self.training_rows = parts.training
        if not self.test:
            raise InvalidInput(f"task {self.name}: no answer of the test data begins within max_tokens={max_tokens}; give more.")

    def conversations(self, file: str) -> list[list[Turn]]:
        """The turns of each row up to its last answer."""
        rows = read_rows(file, self.columns)
        columns = self.columns(rows[0])
        further = "input" if self.pair is None and columns == ALPACA else None
        if not self.tokenizer.chat_template and any(isinstance(row[columns[0]], list) for row in rows):
            raise InvalidInput(
                f"task {self.name}: the tokenizer has no chat template to write {columns[0]} with; give one, or rows with a prompt "
                "and an answer (prompt=COLUMN,answer=COLUMN)."
            )
        return [turns_of(row, columns, further, f"{file}, row {number}") for number, row in enumerate(rows, 1)]

    def columns(self, first: Row) -> tuple[str, ...]:
        """(the column of turns,), or those of a prompt and its answer: what was asked for, else what the first row has."""
        if self.pair is not None:
            return self.pair
        forms = ((self.messages,), *(FORMS if self.messages == MESSAGES else ()))
        return next((form for form in forms if first.keys() >= {*form}), forms[0])

    def batches(self, conversations: Sequence[Sequence[Turn]]) -> list[Batch]:
        written = [self.written(turns) for turns in conversations]
        asked = [(tokens, labels) for tokens, labels in written if (labels[1:] != IGNORED_LABEL).any()]
        if len(asked) < len(written):
            log.warning("%d of %d conversations left out: their last answer begins behind max_tokens=%d",
                        len(written) - len(asked), len(written), self.max_tokens)  # fmt: skip
        return [self.padded(some) for some in in_batches(asked, self.batch)]

    def written(self, turns: Sequence[Turn]) -> tuple[Tensor, Tensor]:
        """(tokens, labels), at most max_tokens of each."""
        before, tokens = self.tokens_of(turns)
        labels = torch.tensor(tokens)
        labels[:before] = IGNORED_LABEL
        return torch.tensor(tokens[: self.max_tokens]), labels[: self.max_tokens]

    def tokens_of(self, turns: Sequence[Turn]) -> tuple[int, list[int]]:
        """(how many tokens stand before the answer, all tokens)."""
        if not self.tokenizer.chat_template:
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            before = without_end(self.tokenizer(turns[0][CONTENT])["input_ids"], end)
            return len(before), before + self.tokenizer(turns[1][CONTENT], add_special_tokens=False)["input_ids"] + end
        before = self.by_template(turns[:-1], add_generation_prompt=True)
        tokens = self.by_template(turns)
        if tokens[: len(before)] != before:
            raise InvalidInput(
                f"task {self.name}: as the tokenizer's chat template writes it, a conversation does not begin with what the model "
                "is asked, so its answer cannot be told from that. Give a template that only adds to the turns before."
            )
        return len(before), tokens

    def by_template(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[int]:
        """InvalidInput where the template refuses the turns: many take no system, or only user and assistant in turn."""
        options = {"add_generation_prompt": add_generation_prompt, "tokenize": True, "return_dict": False}
        try:
            found: list[int] = self.tokenizer.apply_chat_template(list(turns), **options)
        except Exception as error:  # whatever a template raises
            shown = " ".join(str(error).split())[:200]
            raise InvalidInput(
                f"task {self.name}: the tokenizer's chat template refuses the conversation {list(turns)!r:.100}: {shown}. Write it "
                "as the template expects, or leave the row out."
            ) from error
        return found

    def padded(self, rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """On the right, behind everything that a causal model reads."""
        tokens, labels = zip(*rows)
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id or 0
        return {
            "input_ids": pad_sequence(list(tokens), batch_first=True, padding_value=filler),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED_LABEL),
        }

    def training(self) -> list[Batch]:
        found = self.batches(self.training_rows)
        if not found:
            raise InvalidInput(
                f"task {self.name}: no answer of the training data begins within max_tokens={self.max_tokens}; give more."
            )
        return found

    def check_model(self, model: nn.Module) -> None:
        refuse_other_models(model, f"task {self.name}", 1)
        limit = position_limit(model)
        refuse_longer([*self.calibration, *self.test, *self.training_beyond(limit, self.max_tokens)], limit, model)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**placed(model, inputs), use_cache=False)

    def asked(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.forward(model, batch).logits[:, :-1], batch["labels"][:, 1:]

    def latency_inputs(self) -> Batch:
        return {name: value for name, value in self.test[0].items() if name != "labels"}

    def prompt(self) -> Batch:
        """What stands before the first answer of the test data."""
        first = self.test[0]
        length = int((first["labels"][0] != IGNORED_LABEL).int().argmax())
        return {name: first[name][:1, : max(1, length)] for name in ("input_ids", "attention_mask")}


def turns_of(row: Row, columns: Sequence[str], further: str | None, place: str) -> list[Turn]:
    """The turns of a row up to its last answer; a prompt and its answer may be lists of turns themselves, as TRL has them. further:
    the column of what follows the prompt, where there is any."""
    if len(columns) == 1:
        return up_to_the_last_answer(row[columns[0]], place)
    prompt, answer = (row[name] for name in columns)
    if isinstance(prompt, list) or isinstance(answer, list):
        return up_to_the_last_answer(prompt + answer if type(prompt) is type(answer) else [prompt, answer], place)
    more = row.get(further) if further else None
    asked = f"{prompt}\n\n{more}" if more else str(prompt)
    return [{ROLE: "user", CONTENT: asked}, {ROLE: ANSWERS, CONTENT: str(answer)}]


def up_to_the_last_answer(given: Sequence[Any], place: str) -> list[Turn]:
    """InvalidInput where `given` are no turns, or none of them is an answer."""
    turns = [turn for turn in map(as_message, given) if turn is not None] if isinstance(given, list) else []
    if not isinstance(given, list) or len(turns) < len(given):
        raise InvalidInput(
            f"{place}: {given!r:.60} is no list of turns; expected objects with {ROLE!r} and {CONTENT!r} (or {FROM!r}, {VALUE!r})."
        )
    answers = [number for number, turn in enumerate(turns) if turn[ROLE] == ANSWERS]
    if not answers or not answers[-1]:
        raise InvalidInput(f"{place}: no turn after the first has the role {ANSWERS!r}; leave the row out.")
    return turns[: answers[-1] + 1]


def as_message(turn: Any) -> Turn | None:
    """A turn with `role` and `content`, of one that has these or ShareGPT's; None for anything else."""
    if not isinstance(turn, dict):
        return None
    if {FROM, VALUE} <= turn.keys() and isinstance(turn[FROM], str):
        return {ROLE: ROLES.get(turn[FROM], turn[FROM]), CONTENT: turn[VALUE]}
    return turn if {ROLE, CONTENT} <= turn.keys() else None


def without_end(tokens: list[int], end: list[int]) -> list[int]:
    """Some tokenizers put the end-of-text token behind every text."""
    return tokens[:-1] if end and tokens[-1:] == end and len(tokens) > 1 else tokens
