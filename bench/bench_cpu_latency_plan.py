"""A plan for a latency budget, by a table measured here, cut and timed again beside the dense model."""

import copy

import pytest
import torch

import headprune as hp
from headprune.evaluation import measure_latency_table
from headprune.sources import open_model

SLACK = 1.05  # the time measured again may exceed the budget by 5 %


@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_a_latency_plan_keeps_its_budget(versus, fraction):
    dense, _ = open_model("minilm")
    inputs = {"input_ids": torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))}
    table = measure_latency_table(dense, inputs, repeats=9)
    scores = hp.score(dense, criterion="magnitude_l2")
    pruned, plan = copy.deepcopy(dense), hp.plan(scores, hp.Budget(latency=fraction, table=table), allocation="optimal")
    hp.prune(pruned, plan)
    versus(
        f"CPU latency plan, MiniLM, 8 x 128 tokens, {fraction:.0%} away by the table ({plan.removed_heads} of 72 heads go)",
        lambda: pruned(**inputs), {"dense": lambda: dense(**inputs)}, at_most=(1 - fraction) * SLACK, rounds=15,
    )  # fmt: skip
