"""Retrieval with an encoder: texts find the documents that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput, unknown_name
from headprune.evaluation.data import EvaluationData, Progress, placed
from headprune.evaluation.metric import Metric, mean
from headprune.evaluation.padding import refuse_without_padding

Encode = Callable[[list[str]], Mapping[str, Tensor]]  # texts -> input_ids and attention_mask
POOLINGS = ("mean", "cls", "last", "first")  # first: as cls
WITHOUT_HEAD = "Take what is under its head: hp.load(folder, base=True), or AutoModel.from_pretrained(folder)."


class Retrieval(EvaluationData):
    """mrr (mean reciprocal rank, the headline) and accuracy@1, @10 of each query's document among all documents.

    Embeddings are pooled over tokens (mean, cls: the first one, or last) and normalised; documents are ranked by cosine, equal
    texts as one.
    relevant: which document belongs to each query, by default the one at the same place. Raises InvalidInput for an index without
    a document, an unknown pooling, a tokenizer without a padding token, and where nothing is given.
    """

    name = "retrieval"
    headline = "mrr"
    higher_is_better = True
    base = True

    def __init__(
        self, queries: Sequence[str], documents: Sequence[str], tokenizer: Any, *, relevant: Sequence[int] | None = None,
        batch: int = 32, max_tokens: int = 256, pooling: str = "mean",
    ) -> None:  # fmt: skip
        check_pooling(pooling)
        refuse_without_padding(tokenizer, self.name)
        self.queries, self.documents = list(queries), list(documents)
        self.relevant = list(range(len(queries))) if relevant is None else list(relevant)
        strangers = [index for index in self.relevant if not 0 <= index < len(self.documents)]
        if strangers or len(self.relevant) != len(self.queries) or not self.queries:
            raise InvalidInput(
                f"{len(self.queries)} queries, {len(self.documents)} documents, {len(self.relevant)} relevant ones "
                f"{strangers[:3] or ''}: every query needs one document of those given."
            )
        self.batch, self.pooling = batch, pooling
        self.encode: Encode = lambda texts: encoded(tokenizer, texts, max_tokens)

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        different, relevant = different_texts(self.documents, self.relevant)
        found = embed_texts(model, self.queries + different, self.encode, self.batch, progress, self.pooling)
        queries, documents = found.split([len(self.queries), len(different)])
        return rank_metrics(ranks(queries, documents, relevant), (1, 10))

    def latency_inputs(self) -> Mapping[str, Tensor]:
        return self.encode(self.documents[: self.batch])


def encoded(tokenizer: Any, texts: list[str], max_tokens: int) -> dict[str, Tensor]:
    found = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def embed(model: nn.Module, batch: Mapping[str, Tensor], pooling: str = "mean") -> Tensor:
    """[texts, hidden], of length 1, in fp32 at least: sums over tokens and squares of half precision overflow. Differentiable."""
    batch = placed(model, batch)
    states = getattr(model(**batch), "last_hidden_state", None)
    if states is None:
        raise InvalidInput(f"a {type(model).__name__} gives no states of its tokens, which retrieval pools. {WITHOUT_HEAD}")
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return F.normalize(pooled(states, batch["attention_mask"], pooling), dim=-1)


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[texts, hidden] of states [texts, tokens, hidden]: the mean over each text's tokens, or its first or last one's."""
    if pooling == "mean":
        return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device) * mask
    chosen = places.argmax(dim=1) if pooling == "last" else mask.long().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), chosen]


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise unknown_name("pooling", pooling, POOLINGS)


@torch.inference_mode()
def embed_texts(
    model: nn.Module, texts: list[str], encode: Encode, batch: int, progress: Progress | None = None, pooling: str = "mean"
) -> Tensor:
    """[texts, hidden], fp32 on the CPU; texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for index, row in zip(chosen, embed(model, encode([texts[index] for index in chosen]), pooling).float().cpu()):
            rows[index] = row
        if progress:
            progress(min(start + batch, len(order)), len(order))
    return torch.stack([rows[index] for index in range(len(texts))])


def different_texts(documents: Sequence[str], relevant: Iterable[int]) -> tuple[list[str], Tensor]:
    """(each text once, the place there of each query's own document [queries]): of two copies neither can be the right one."""
    places: dict[str, int] = {}
    for text in documents:
        places.setdefault(text, len(places))
    return list(places), torch.tensor([places[documents[index]] for index in relevant])


def ranks(queries: Tensor, documents: Tensor, relevant: Tensor) -> Tensor:
    """[queries], int64: 1 + how many documents are nearer to the query than its own; the last where that is NaN."""
    similarity = queries @ documents.T
    own = similarity.gather(1, relevant[:, None])
    nearer = (similarity > own).sum(dim=1)
    return torch.where(own[:, 0].isnan(), len(documents), 1 + nearer)


def rank_metrics(found: Tensor, top: Sequence[int]) -> dict[str, Metric]:
    accuracy = {f"accuracy@{count}": Metric((found <= count).double(), mean) for count in top}
    return {"mrr": Metric(1 / found.double(), mean), **accuracy}
