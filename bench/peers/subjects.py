"""The models that all peers prune, with their data: a pretrained sentence encoder, a small decoder with grouped key/value heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headprune.evaluation.retrieval import rank_metrics, ranks
from headprune.evaluation.tasks import Task, build_task
from headprune.models import attention_sites
from headprune.sources import EMBEDDED, model_folder, open_model

TEXTS = 64  # of a test batch
BATCHES = 6  # of calibration, for every peer the same


@dataclass(frozen=True)
class Subject:
    name: str
    kind: str
    model: nn.Module
    task: Task
    folder: Path

    @property
    def query_heads(self) -> list[int]:
        return [site.head_map.query_heads for site in attention_sites(self.model)]

    @property
    def head_dim(self) -> int:
        return attention_sites(self.model)[0].head_dim


def subject(name: str, kind: str) -> Subject:
    model, tokenizer = open_model(name)
    return Subject(name, kind, model, build_task(EMBEDDED[name].task, tokenizer), model_folder(name))


SUBJECTS = {"minilm": lambda: subject("minilm", "encoder"), "stdlib-lm": lambda: subject("stdlib-lm", "decoder")}


def write_batches(found: Subject, path: Path) -> None:
    """Calibration, test and prompt as tensors, so that a peer's environment needs neither the task nor the tokenizer."""
    task = found.task
    if found.kind == "encoder":
        texts = [pair.query for pair in task.test] + [pair.document for pair in task.test]
        test = [dict(task.encoded(texts[start : start + TEXTS])) for start in range(0, len(texts), TEXTS)]
        content: dict[str, Any] = {
            "calibration": [dict(batch) for batch in task.calibration[:BATCHES]],
            "test": test,
            "prompt": None,
        }
    else:
        test = [{"input_ids": rows} for rows in task.test.split(task.batch)]
        content = {"calibration": task.calibration[:BATCHES], "test": test, "prompt": task.prompt()}
    torch.save(content, path)


def quality_of(found: Subject, outputs: Tensor) -> float:
    """The task's headline metric of the outputs that a peer's process wrote, in order of the test data."""
    task = found.task
    if found.kind == "encoder":
        queries, documents = outputs.float().chunk(2)
        return rank_metrics(ranks(queries, documents, torch.arange(len(queries))), (1,))[task.headline].value
    return float(torch.exp(outputs.sum() / (len(outputs) * (task.window - 1))))
