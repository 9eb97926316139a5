"""Retrieval with a sentence encoder: the first sentence of a docstring finds the rest of it."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import Progress, placed
from headprune.evaluation.metric import Metric
from headprune.evaluation.retrieval import embed, embed_texts, encoded, rank_metrics, ranks
from headprune.evaluation.tasks.docstrings import Pair, docstring_pairs
from headprune.evaluation.tasks.task import Task, register_task

SCALE = 20.0  # of the cosine similarities in the contrastive loss, as sentence-transformers trains


@register_task
class DocstringRetrieval(Task):
    """First sentence of a docstring -> the rest of it, over this Python's standard library.

    Embeddings are mean-pooled and normalised. The loss is cross entropy of each sentence over the batch's documents
    (multiple negatives ranking, Henderson et al. 2017); a batch holds its sentences first, then their documents.
    validation: tests on files out of the calibration half, and calibrates on the rest of it.
    seed: which of the calibration pairs are drawn, and in what order; the test pairs are always the same.
    """

    name = "docstring-retrieval"
    headline = "mrr"
    higher_is_better = True

    def __init__(
        self,
        tokenizer: Any,
        calibration_pairs: int = 384,
        test_pairs: int = 600,
        batch: int = 32,
        max_tokens: int = 96,
        validation: bool = False,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.max_tokens, self.batch = tokenizer, max_tokens, batch
        calibration, test = docstring_pairs(validation)
        self.test = shuffled(test)[:test_pairs]
        chosen = sorted(shuffled(calibration, seed)[:calibration_pairs], key=lambda pair: len(pair.document))
        groups = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
        self.calibration = [self.sentences_and_rests(group) for group in shuffled(groups, seed)]
        self.training_pairs = shuffled(calibration, seed)
        self.digest = hashlib.sha256(repr(self.test).encode()).hexdigest()[:16]

    def check_model(self, model: nn.Module) -> None:
        if getattr(model, "can_generate", bool)():
            raise InvalidInput(f"task {self.name} needs an encoder; {type(model).__name__} is a language model.")

    def training(self) -> list[dict[str, Tensor]]:
        """All pairs of the calibration half; those of like length share a batch."""
        pairs = sorted(self.training_pairs, key=lambda pair: len(pair.document))
        groups = [pairs[start : start + self.batch] for start in range(0, len(pairs), self.batch)]
        return [self.sentences_and_rests(group) for group in shuffled(groups)]

    def sentences_and_rests(self, pairs: list[Pair]) -> dict[str, Tensor]:
        return self.encoded([pair.query for pair in pairs] + [pair.document for pair in pairs])

    def encoded(self, texts: list[str]) -> dict[str, Tensor]:
        return encoded(self.tokenizer, texts, self.max_tokens)

    def embed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[texts, hidden], of length 1."""
        return embed(model, batch)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        queries, documents = self.embed(model, batch).chunk(2)
        return F.cross_entropy(SCALE * queries @ documents.T, torch.arange(len(queries), device=queries.device), reduction="none")

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(**placed(model, batch))

    def readout(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The embeddings: heads whose errors over a text's tokens cancel in the mean are spared by the states, not by these."""
        return self.embed(model, batch)

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """accuracy@1 and mean reciprocal rank of each sentence's own document among all test documents."""
        texts = [pair.query for pair in self.test] + [pair.document for pair in self.test]
        queries, documents = self.embed_all(model, texts, progress).chunk(2)
        return rank_metrics(ranks(queries, documents, torch.arange(len(queries))), (1,))

    def embed_all(self, model: nn.Module, texts: list[str], progress: Progress | None = None) -> Tensor:
        """[texts, hidden], fp32 on the CPU; texts of like length share a batch."""
        return embed_texts(model, texts, self.encoded, 2 * self.batch, progress)

    def outputs(self, model: nn.Module) -> Tensor:
        return self.embed_all(model, [pair.query for pair in self.test[:64]])

    def latency_inputs(self) -> dict[str, Tensor]:
        return self.encoded([pair.document for pair in self.test[:16]])


def shuffled(items: list[Any], seed: int = 0) -> list[Any]:
    """The same order for the same items and seed, every time."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


__all__ = ["DocstringRetrieval", "Pair"]
