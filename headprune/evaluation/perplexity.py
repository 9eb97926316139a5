"""Perplexity of a causal language model on any text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import EvaluationData, Progress
from headprune.evaluation.metric import Metric, perplexity
from headprune.evaluation.positions import position_limit
from headprune.evaluation.predicted import predictor
from headprune.evaluation.token_stream import begin_of, tokens_of
from headprune.models.tokens import decoder_of

LATENCY_ROWS, PROMPT_TOKENS = 4, 32


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of the text; those from `first` on are predicted, from all tokens of the window before them."""

    start: int
    first: int
    end: int


class Perplexity(EvaluationData):
    """exp of the mean negative log-likelihood over tokens, with the share of tokens that the model ranks first (accuracy).

    Every window is read from its own beginning. With stride = window (the default) windows do not overlap, the first token of each
    has no context and is not counted, and what does not fill a window at the end is counted too: the protocol of GPTQ and SparseGPT
    on WikiText, but for that end. With a smaller stride each window counts only the tokens that no window before it held, which
    thus have at least window - stride tokens of context (Hugging Face, "Perplexity of fixed-length models"). Where the tokenizer
    puts a token before every text (Llama, Gemma, which is lost without it), each window is read behind that, as one of its tokens,
    and the first of the text is counted too.

    text: a Path to a UTF-8 file, the text itself, or its documents: texts, or rows with a "text" (a datasets object), joined by
    blank lines. It is of the tokenizer's tokens: only models with one tokenizer compare. An example of an interval is a window.
    Raises InvalidInput for a text of fewer than two tokens, or a stride that is not in [1, window].
    """

    name = "perplexity"
    more = "a longer text or a smaller window"
    headline = "perplexity"
    higher_is_better = False

    def __init__(
        self, text: Path | str | Iterable[str | Mapping[str, Any]], tokenizer: Any, *, window: int = 512, stride: int | None = None,
        batch: int = 8,
    ) -> None:  # fmt: skip
        stride = window if stride is None else stride
        if window < 2 or not 1 <= stride <= window or batch < 1:
            raise InvalidInput(f"window={window}, stride={stride}, batch={batch}: expected 1 <= stride <= window, 2 <= window.")
        self.tokens = tokens_of(tokenizer, text_of(text))
        if len(self.tokens) < 2:
            raise InvalidInput(f"the text has {len(self.tokens)} tokens; perplexity needs at least 2.")
        self.window, self.batch, self.begin = window, batch, begin_of(tokenizer)
        inside = window - len(self.begin)
        self.windows = windows(len(self.tokens), inside, min(stride, inside), len(self.begin))

    def check_model(self, model: nn.Module) -> None:
        """Raises InvalidInput where `model` is no language model, or takes fewer tokens than a window has."""
        refuse_other_models(model, self.name, min(self.window, len(self.begin) + len(self.tokens)))

    @torch.inference_mode()
    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        self.check_model(model)
        losses, right, done = [], [], 0
        predict = predictor(model, self.batch, self.tokens[: self.window])
        for _, some in groupby(self.windows, key=lambda window: window.end - window.start):
            alike = list(some)
            for begin in range(0, len(alike), self.batch):
                chunk = alike[begin : begin + self.batch]
                rows = torch.stack([torch.cat([self.begin, self.tokens[window.start : window.end]]) for window in chunk])
                likelihood, hits = predict(rows)
                for window, loss, hit in zip(chunk, likelihood, hits):
                    counted = slice(max(window.first - window.start + len(self.begin) - 1, 0), None)
                    losses.append([float(loss[counted].double().sum()), float(len(loss[counted]))])
                    right.append(hit[counted])
                done += len(chunk)
                if progress:
                    progress(done, len(self.windows))
        shares = torch.tensor([[float(hit.sum()), float(len(hit))] for hit in right])
        return {"perplexity": Metric(torch.tensor(losses, dtype=torch.float64), perplexity), "accuracy": Metric(shares, share)}

    def latency_inputs(self) -> dict[str, Tensor]:
        whole = len(self.tokens) // self.window
        if not whole:
            return {"input_ids": self.tokens[None]}
        return {"input_ids": self.tokens[: whole * self.window].view(whole, self.window)[:LATENCY_ROWS]}

    def prompt(self) -> dict[str, Tensor]:
        rows = self.latency_inputs()["input_ids"][:, : max(1, min(PROMPT_TOKENS, self.window // 2))]
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def windows(tokens: int, window: int, stride: int, before: int = 0) -> list[Window]:
    """All windows over a text of `tokens`, each read behind `before` tokens; one that would predict nothing is left out."""
    found, counted = [], 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        if end - max(counted, start + 1 - before) > 0:
            found.append(Window(start, counted, end))
        counted = end
        if end == tokens:
            break
    return found


def share(rows: Tensor) -> float:
    """First column over second: right tokens over tokens."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def refuse_other_models(model: nn.Module, name: str, tokens: int) -> None:
    """InvalidInput where `model` is no causal language model, or takes fewer than `tokens`, its window."""
    if decoder_of(model) is not None:
        raise InvalidInput(
            f"{name} needs a causal language model; {type(model).__name__} is an encoder-decoder, for which there is the task "
            "text-to-text."
        )
    if not getattr(model, "can_generate", bool)():
        raise InvalidInput(f"{name} needs a causal language model; {type(model).__name__} is none.")
    limit = position_limit(model)
    if limit is not None and limit < tokens:
        raise InvalidInput(f"a window has {tokens} tokens, and {type(model).__name__} takes at most {limit}; give window={limit}.")


def text_of(text: Path | str | Iterable[str | Mapping[str, Any]]) -> str:
    if isinstance(text, Path):
        try:
            return text.read_text(encoding="utf-8-sig")  # without the mark that some programs put first
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{text} cannot be read as UTF-8 text: {error}.") from None
    if isinstance(text, str):
        return text
    return "\n\n".join(document if isinstance(document, str) else document["text"] for document in text)
