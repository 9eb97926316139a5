"""Perplexity of a causal language model on the standard library's text."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import Progress
from headprune.evaluation.metric import Metric, mean, perplexity
from headprune.evaluation.perplexity import negative_log_likelihood, refuse_other_models
from headprune.evaluation.tasks.standard_library import Document, digest, standard_library_text
from headprune.evaluation.tasks.task import Task, register_task
from headprune.models.placement import device_of

PROMPT_ROWS, PROMPT_TOKENS = 4, 32  # tokens: at most half a window
LATENCY_ROWS = 4
TRAINING_WINDOWS = 4096


@register_task
class StandardLibraryText(Task):
    """Next-token prediction on Python's own source text, over packages that neither training nor calibration saw.

    The documents of a part are joined (each behind the tokenizer's end-of-text token, where it has one) and cut into windows
    of `window` tokens that do not overlap, of which a seeded choice is used. Perplexity is exp of the mean negative
    log-likelihood over all tokens of all windows but the first of each, which has no context: it is of the tokenizer's
    tokens, so only models with the same tokenizer compare. Samples are windows; their loss is the mean over their tokens.
    seed: which calibration windows are drawn; the test windows are always the same.
    """

    name = "standard-library-text"
    headline = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        tokenizer: Any,
        window: int = 256,
        batch: int = 8,
        calibration_windows: int = 128,
        test_windows: int = 160,
        seed: int = 0,
    ) -> None:
        if window < 2 or batch < 1:
            raise InvalidInput(f"window={window}, batch={batch}: expected at least 2 tokens a window and 1 window a batch.")
        self.tokenizer, self.window, self.batch, self.seed = tokenizer, window, batch, seed
        parts = standard_library_text()
        # [windows, window], int64
        self.test = windows_of(token_stream(tokenizer, parts.test), window, test_windows)
        chosen = windows_of(token_stream(tokenizer, parts.calibration), window, calibration_windows, seed)
        if not len(self.test):
            raise InvalidInput(f"the test set is empty: test_windows={test_windows} of {window} tokens gives no window.")
        self.calibration = [{"input_ids": rows, "labels": rows} for rows in chosen.split(batch)] if len(chosen) else []
        self.digest = digest((*parts.calibration, *parts.test))[:16]

    def training(self) -> list[dict[str, Tensor]]:
        """Windows of the packages that neither calibration nor test holds."""
        stream = token_stream(self.tokenizer, standard_library_text().training)
        chosen = windows_of(stream, self.window, TRAINING_WINDOWS, self.seed)
        return [{"input_ids": rows, "labels": rows} for rows in chosen.split(self.batch)] or self.calibration

    def check_model(self, model: nn.Module) -> None:
        refuse_other_models(model, f"task {self.name}", self.window)

    def predictions(self, model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [windows, window - 1, vocabulary] in fp32, the tokens that they are to predict [windows, window - 1])."""
        logits = self.logits(model, windows)
        return logits[:, :-1], windows[:, 1:].to(logits.device)

    def logits(self, model: nn.Module, windows: Tensor) -> Tensor:
        """[windows, window, vocabulary], fp32."""
        logits: Tensor = self.forward(model, {"input_ids": windows}).logits
        return logits.float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return negative_log_likelihood(*self.predictions(model, batch["input_ids"])).mean(dim=1)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(input_ids=batch["input_ids"].to(device_of(model)), use_cache=False)

    @torch.inference_mode()
    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """Perplexity, and the share of tokens that the model ranks first (accuracy); an example is a window."""
        losses, right = [], []
        for windows in self.test.split(self.batch):
            logits, targets = self.predictions(model, windows)
            losses.append(negative_log_likelihood(logits, targets).double().sum(dim=1).cpu())
            right.append((logits.argmax(dim=-1) == targets).double().mean(dim=1).cpu())
            if progress:
                progress(sum(map(len, losses)), len(self.test))
        total = torch.cat(losses)
        rows = torch.stack([total, torch.full_like(total, self.window - 1)], dim=1)
        return {"perplexity": Metric(rows, perplexity), "accuracy": Metric(torch.cat(right), mean)}

    @torch.inference_mode()
    def outputs(self, model: nn.Module) -> Tensor:
        return self.logits(model, self.test[:2])

    def latency_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.test[:LATENCY_ROWS]}

    def prompt(self) -> dict[str, Tensor]:
        rows = self.test[:PROMPT_ROWS, : min(PROMPT_TOKENS, self.window // 2)]
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def token_stream(tokenizer: Any, documents: tuple[Document, ...]) -> Tensor:
    """The documents' tokens in one row [tokens], int64, each behind the end-of-text token where there is one."""
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(start + ids for ids in encoded)), dtype=torch.long)


def windows_of(stream: Tensor, window: int, count: int, seed: int = 0) -> Tensor:
    """At most `count` windows [windows, window] that do not overlap, the same choice for the same text and seed every time."""
    whole = stream[: len(stream) // window * window].view(-1, window)
    order = random.Random(seed).sample(range(len(whole)), k=min(max(count, 0), len(whole)))
    return whole[order]
