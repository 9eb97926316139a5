"""Perplexity of a causal language model on windows of text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import Progress
from headprune.evaluation.metric import Metric, mean, perplexity
from headprune.evaluation.perplexity import refuse_other_models
from headprune.evaluation.predicted import negative_log_likelihood, predictor
from headprune.evaluation.tasks.task import Task
from headprune.evaluation.token_stream import begin_of
from headprune.models.placement import device_of

PROMPT_ROWS, PROMPT_TOKENS = 4, 32  # tokens: at most half a window
LATENCY_ROWS = 4


class CausalText(Task):
    """Next-token prediction over windows of tokens that do not overlap, each behind the token that the tokenizer puts before every
    text, where it does.

    Perplexity is exp of the mean negative log-likelihood over all tokens of all test windows but the first of each, which has no
    context: it is of the tokenizer's tokens, so only models with the same tokenizer compare. Samples are windows; their loss is
    the mean over their tokens.
    """

    headline = "perplexity"
    higher_is_better = False

    def __init__(self, tokenizer: Any, calibration: Tensor, test: Tensor, batch: int) -> None:
        """calibration, test: [windows, window], int64."""
        self.tokenizer, self.test, self.batch = tokenizer, test, batch
        self.window = test.shape[1]
        if not len(test):
            raise InvalidInput(f"the test set is empty: no window of {self.window} tokens. Give more text or a smaller window.")
        self.calibration = self.batches(calibration)

    def batches(self, windows: Tensor) -> list[dict[str, Tensor]]:
        return [{"input_ids": rows, "labels": rows} for rows in windows.split(self.batch)] if len(windows) else []

    @classmethod
    def check_options(cls, model: nn.Module, options: Mapping[str, Any]) -> None:
        window = options.get("window", signature(cls).parameters["window"].default)
        if isinstance(window, int):  # what else it may be is refused with the other options
            refuse_other_models(model, f"task {cls.name}", window)

    def check_model(self, model: nn.Module) -> None:
        refuse_other_models(model, f"task {self.name}", self.window)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = self.forward(model, batch).logits
        return negative_log_likelihood(logits[:, :-1], batch["input_ids"][:, 1:].to(logits.device)).mean(dim=1)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(input_ids=batch["input_ids"].to(device_of(model)), use_cache=False)

    @torch.inference_mode()
    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """Perplexity, and the share of tokens that the model ranks first (accuracy); an example is a window."""
        losses, right = [], []
        predict = predictor(model, min(self.batch, len(self.test)), self.test[0])
        for windows in self.test.split(self.batch):
            found, hits = predict(windows)
            losses.append(found.double().sum(dim=1))
            right.append(hits.double().mean(dim=1))
            if progress:
                progress(sum(map(len, losses)), len(self.test))
        total = torch.cat(losses)
        rows = torch.stack([total, torch.full_like(total, self.window - 1)], dim=1)
        return {"perplexity": Metric(rows, perplexity), "accuracy": Metric(torch.cat(right), mean)}

    @torch.inference_mode()
    def outputs(self, model: nn.Module) -> Tensor:
        logits: Tensor = self.forward(model, {"input_ids": self.test[:2]}).logits
        return logits.float()

    def latency_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.test[:LATENCY_ROWS]}

    def prompt(self) -> dict[str, Tensor]:
        rows = self.test[:PROMPT_ROWS, : min(PROMPT_TOKENS, self.window // 2)]
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def refuse_sizes(window: int, batch: int) -> None:
    if window < 2 or batch < 1:
        raise InvalidInput(f"window={window}, batch={batch}: expected at least 2 tokens a window and 1 window a batch.")


def begun_windows(tokenizer: Any, stream: Tensor, window: int, count: int, seed: int = 0) -> Tensor:
    """As `windows_of`, each behind the token that `tokenizer` puts before every text, where it does: Gemma is lost without it."""
    begin = begin_of(tokenizer)
    pieces = windows_of(stream, window - len(begin), count, seed)
    return torch.cat([begin.expand(len(pieces), -1), pieces], dim=1)


def windows_of(stream: Tensor, window: int, count: int, seed: int = 0) -> Tensor:
    """At most `count` windows [windows, window] that do not overlap, the same choice for the same text and seed every time."""
    whole = stream[: len(stream) // window * window].view(-1, window)
    order = random.Random(seed).sample(range(len(whole)), k=min(max(count, 0), len(whole)))
    return whole[order]
