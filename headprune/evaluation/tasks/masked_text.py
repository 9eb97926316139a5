"""Masked tokens of one's own text, as encoders are pretrained on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import placed
from headprune.evaluation.positions import position_limit
from headprune.evaluation.tasks.causal_text import windows_of
from headprune.evaluation.tasks.rows import read_texts, refuse_counts, with_test
from headprune.evaluation.tasks.target_tokens import Batch, TargetTokens
from headprune.evaluation.tasks.task import register_task
from headprune.evaluation.tasks.text import long_enough, without_the_last_tenth
from headprune.evaluation.token_stream import token_stream
from headprune.models.tokens import IGNORED_LABEL


@register_task
class MaskedText(TargetTokens):
    """Masked tokens of your own text, for encoders with their pretraining head: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .txt or .md file, or rows as of `text`, whose `column` holds documents, or a folder of such.
    test: the same, for the perplexity; by default the last tenth of calibration's tokens, which then count for nothing else.
    training: the same, for recovery; by default the text of calibration. Documents are joined and cut into windows of `window`
    tokens that do not overlap, of which a seeded choice is used; `masked` of their tokens (in every window, at least one) are
    replaced by the mask token, always (Wettig et al. 2023: as good as BERT's 80 %).
    """

    name = "masked-text"
    more = "test=FILE, more text in calibration or a smaller window (and test_windows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        column: str = "text",
        window: int = 128,
        masked: float = 0.15,
        batch: int = 16,
        calibration_windows: int = 256,
        test_windows: int = 512,
        training_windows: int = 4096,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_windows=calibration_windows, test_windows=test_windows, training_windows=training_windows)
        if tokenizer.mask_token_id is None:
            raise InvalidInput(f"task {self.name}: the tokenizer has no mask token, so the model is no masked language model.")
        if batch < 1 or not 0 < masked < 1:
            raise InvalidInput(f"batch={batch}, masked={masked}: expected at least 1 window a batch, and a share between 0 and 1.")
        self.tokenizer, self.batch, self.window, self.masked, self.seed = tokenizer, batch, window, masked, seed
        self.before, self.behind = special_tokens(tokenizer)
        self.inside = window - len(self.before) - len(self.behind)
        if self.inside < 2:
            raise InvalidInput(f"window={window}; expected at least 2 tokens beside {window - self.inside} special ones.")

        def tokens(source: str) -> Tensor:
            return token_stream(tokenizer, read_texts(source, column))

        if training is not None:
            read_texts(training, column)  # refused before anything is scored; tokenised when it is wanted
        stream, held_out = with_test(tokens, calibration, test, training, without_the_last_tenth, nested=True)
        if min(len(stream), len(held_out)) < self.inside:
            raise InvalidInput(
                f"task {self.name}: calibration has {len(stream)} tokens and test {len(held_out)}; expected at least one window of "
                f"{window} each. Give more text, or a smaller window."
            )
        self.calibration = self.batches(windows_of(stream, self.inside, calibration_windows, seed), seed)
        self.test = self.batches(windows_of(held_out, self.inside, test_windows), 0)
        self.stream, self.training_text, self.column, self.training_windows = stream, training, column, training_windows

    def batches(self, windows: Tensor, seed: int) -> list[Batch]:
        """Of windows [windows, inside], each put between special tokens, some of its tokens masked, the same for the same seed."""
        draws = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed))
        chosen = draws.argsort(dim=1).argsort(dim=1) < max(1, round(self.masked * self.inside))
        framed = torch.cat([self.before.expand(len(windows), -1), windows, self.behind.expand(len(windows), -1)], dim=1)
        hidden = F.pad(chosen, (len(self.before), len(self.behind)))
        inputs, labels = framed.masked_fill(hidden, self.tokenizer.mask_token_id), framed.masked_fill(~hidden, IGNORED_LABEL)
        return [
            {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": wanted}
            for some, wanted in zip(inputs.split(self.batch), labels.split(self.batch))
        ]

    def training(self) -> list[Batch]:
        stream = self.stream
        if self.training_text is not None:
            stream = token_stream(self.tokenizer, read_texts(self.training_text, self.column))
            stream = long_enough(stream, self.training_text, self.inside)
        return self.batches(windows_of(stream, self.inside, self.training_windows, self.seed), self.seed + 1)

    def check_model(self, model: nn.Module) -> None:
        name = type(model).__name__
        if "MaskedLM" not in name and "WithLMHead" not in name:
            raise InvalidInput(
                f"task {self.name} needs a masked language model with its head (...ForMaskedLM); {name} has none. Load the "
                "checkpoint with AutoModelForMaskedLM and save it, or take another task."
            )
        limit = position_limit(model)
        if limit is not None and limit < self.window:
            raise InvalidInput(f"a window has {self.window} tokens, and {name} takes at most {limit}; give window={limit}.")

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**placed(model, {name: value for name, value in batch.items() if name != "labels"}))

    def asked(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.forward(model, batch).logits, batch["labels"]

    def latency_inputs(self) -> Batch:
        return {name: value for name, value in self.test[0].items() if name != "labels"}


def special_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before a text and behind it, [tokens] each."""
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, special = torch.tensor(found["input_ids"]), [bool(mark) for mark in found["special_tokens_mask"]]
    if False not in special:
        return ids[:0], ids[:0]
    return ids[: special.index(False)], ids[len(special) - special[::-1].index(False) :]
