"""Retrieval with an embedder: a text finds the one that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import Progress, placed
from headprune.evaluation.embedder import tell_left_out, usual_pooling, written_pooling, written_prompts
from headprune.evaluation.metric import Metric
from headprune.evaluation.padding import refuse_without_padding
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.retrieval import (
    WITHOUT_HEAD,
    check_pooling,
    different_texts,
    embed,
    embed_texts,
    encoded,
    rank_metrics,
    ranks,
)  # fmt: skip
from headprune.evaluation.tasks.rows import in_batches, shuffled
from headprune.evaluation.tasks.task import Task

SCALE = 20.0  # of the cosine similarities in the contrastive loss, as sentence-transformers trains


@dataclass(frozen=True)
class Pair:
    query: str
    document: str


class TextPairs(Task):
    """Each query -> its document, among the documents of all test pairs.

    Embeddings are pooled over tokens and normalised. The loss is cross entropy of each query over the batch's documents
    (multiple negatives ranking, Henderson et al. 2017); a batch holds its queries first, then their documents.
    """

    headline = "mrr"
    higher_is_better = True
    base = True

    def __init__(
        self, tokenizer: Any, calibration: Sequence[Pair], test: Sequence[Pair], training: Sequence[Pair], *, batch: int,
        max_tokens: int, seed: int = 0, pooling: str | None = None, prompt: str | None = None, document_prompt: str | None = None,
    ) -> None:  # fmt: skip
        """pooling, prompt (put before each query), document_prompt: by default what the tokenizer's folder says."""
        refuse_without_padding(tokenizer, f"task {self.name}")
        pooling = written_pooling(tokenizer) if pooling is None else pooling
        if pooling is not None:
            check_pooling(pooling)
        written = written_prompts(tokenizer)
        tell_left_out(tokenizer)
        before = Pair(written[0] if prompt is None else prompt, written[1] if document_prompt is None else document_prompt)
        if batch < 2:
            raise InvalidInput(f"batch={batch}; expected at least 2 pairs a batch: the documents of the others are the wrong ones.")
        self.tokenizer, self.max_tokens, self.batch, self.pooling = tokenizer, max_tokens, batch, pooling
        self.test, self.training_pairs = prompted(test, before), prompted(training, before)
        self.calibration = self.batches(prompted(calibration, before), seed)

    @property
    def calibration_examples(self) -> int:
        return sum(len(batch["input_ids"]) // 2 for batch in self.calibration)

    def check_model(self, model: nn.Module) -> None:
        if getattr(model, "can_generate", bool)():
            raise InvalidInput(f"task {self.name} needs an embedder; {type(model).__name__} is a language model. {WITHOUT_HEAD}")
        limit = position_limit(model)
        if limit is not None and self.max_tokens > limit:
            texts = [text for pair in (*self.test, *self.training_pairs) for text in (pair.query, pair.document)]
            refuse_longer([*self.calibration, self.encoded(texts)], limit, model)

    def training(self) -> list[dict[str, Tensor]]:
        return self.batches(self.training_pairs, 0)

    def batches(self, pairs: Sequence[Pair], seed: int) -> list[dict[str, Tensor]]:
        """Those of like length share a batch."""
        pairs = sorted(pairs, key=lambda pair: len(pair.document))
        groups = in_batches(pairs, self.batch)
        return [self.encoded([pair.query for pair in some] + [pair.document for pair in some]) for some in shuffled(groups, seed)]

    def encoded(self, texts: list[str]) -> dict[str, Tensor]:
        return encoded(self.tokenizer, texts, self.max_tokens)

    def embed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[texts, hidden], of length 1."""
        return embed(model, batch, self.pooling or usual_pooling(model))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        queries, documents = self.embed(model, batch).chunk(2)
        return F.cross_entropy(SCALE * queries @ documents.T, torch.arange(len(queries), device=queries.device), reduction="none")

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(**placed(model, batch))

    def readout(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The embeddings: heads whose errors over a text's tokens cancel in the mean are spared by the states, not by these."""
        return self.embed(model, batch)

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """accuracy@1 and mean reciprocal rank of each query's own document among all test documents, equal texts as one."""
        count = len(self.test)
        different, relevant = different_texts([pair.document for pair in self.test], range(count))
        found = self.embed_all(model, [pair.query for pair in self.test] + different, progress)
        return rank_metrics(ranks(found[:count], found[count:], relevant), (1,))

    def embed_all(self, model: nn.Module, texts: list[str], progress: Progress | None = None) -> Tensor:
        """[texts, hidden], fp32 on the CPU; texts of like length share a batch."""
        return embed_texts(model, texts, self.encoded, 2 * self.batch, progress, self.pooling or usual_pooling(model))

    def outputs(self, model: nn.Module) -> Tensor:
        return self.embed_all(model, [pair.query for pair in self.test[:64]])

    def latency_inputs(self) -> dict[str, Tensor]:
        return self.encoded([pair.document for pair in self.test[:16]])


def prompted(pairs: Sequence[Pair], before: Pair) -> list[Pair]:
    return [Pair(before.query + pair.query, before.document + pair.document) for pair in pairs]
