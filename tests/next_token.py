"""A task for a random decoder: random tokens to predict."""

from typing import ClassVar

import torch
from tiny_models import tokens

from headprune.evaluation.tasks import Task


class NextToken(Task):
    name: ClassVar[str] = "next-token"
    headline: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    tokenizer = None

    def __init__(self) -> None:
        self.calibration = [{"input_ids": tokens(4, 10, seed), "labels": tokens(4, 10, seed)} for seed in range(5)]

    def loss(self, model, batch):
        return model(**batch).loss

    def forward(self, model, batch):
        return model(**batch)

    def evaluate(self, model, progress=None):
        with torch.no_grad():
            return {"loss": float(model(input_ids=tokens(4, 10, 99), labels=tokens(4, 10, 99)).loss)}

    def outputs(self, model):
        return model(input_ids=tokens()).logits

    def latency_inputs(self):
        return {"input_ids": tokens()}
