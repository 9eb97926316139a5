"""Docstring retrieval on all test pairs: over the 600 of the task itself the MRR of one pruned model is known to 0.018 only."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from headprune.evaluation.data import Progress
from headprune.evaluation.metric import Metric
from headprune.evaluation.retrieval import rank_metrics, ranks
from headprune.evaluation.tasks.docstring_retrieval import DocstringRetrieval

POOL = 600  # pairs at most: as many as the task tests on, so that finding a document is about as hard


class AllPairs(DocstringRetrieval):
    """The same calibration data; each sentence is ranked among the documents of its own pool."""

    name = f"docstring-retrieval, all test pairs in pools of at most {POOL}"

    def __init__(self, tokenizer: Any, seed: int) -> None:
        super().__init__(tokenizer, test_pairs=sys.maxsize, seed=seed)

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        texts = [pair.query for pair in self.test] + [pair.document for pair in self.test]
        queries, documents = self.embed_all(model, texts, progress).chunk(2)
        count = -(-len(self.test) // POOL)
        pools = zip(queries.tensor_split(count), documents.tensor_split(count))
        found = [ranks(some, documents, torch.arange(len(some))) for some, documents in pools]
        return rank_metrics(torch.cat(found), (1,))
