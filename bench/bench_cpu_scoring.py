"""Scoring on the CPU: what it costs beside a plain backward pass, head masks with autograd and Torch-Pruning."""

import pytest
import torch
from scoring_peers import head_mask_backward, loss_of, plain_backward, torch_pruning_taylor
from transformers import BertConfig, BertModel

import headprune as hp
from headprune.sources import open_model

BATCHES = 4  # a calibration set, if a small one: what is done once for all batches counts as it does in use


def minilm():
    return open_model("minilm")[0], (16, 64)


def bert_base():
    """Random weights in BERT-base's shape, for speed alone."""
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval(), (2, 64)


MODELS = pytest.mark.parametrize(("name", "make"), [("MiniLM", minilm), ("BERT-base shape, random weights", bert_base)])


def model_and_batches(make):
    model, shape = make()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1000, 20000, shape, generator=generator) for _ in range(BATCHES)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]
    return model, batches, f"{BATCHES} batches of {shape[0]} x {shape[1]} tokens"


@MODELS
def test_gate_gradients_fisher_and_statistics_beside_a_backward_pass(versus, name, make):
    model, batches, size = model_and_batches(make)
    versus(
        f"CPU scores and statistics, {name}, {size}",
        lambda: hp.score(model, batches, ["gate_gradient", "fisher", "entropy"], loss_fn=loss_of),
        {"plain forward + backward": lambda: plain_backward(model, batches)},
        at_most=1.10, rounds=3, grad=True, memory=True,
    )  # fmt: skip


@MODELS
def test_gate_gradients_and_fisher_beside_head_masks(versus, name, make):
    model, batches, size = model_and_batches(make)
    versus(
        f"CPU scores, {name}, {size}", lambda: hp.score(model, batches, ["gate_gradient", "fisher"], loss_fn=loss_of),
        {"head masks with autograd": lambda: head_mask_backward(model, batches)},
        at_least=1.5, rounds=3, grad=True, memory=True,
    )  # fmt: skip


@MODELS
def test_gate_gradients_and_fisher_beside_torch_pruning(versus, name, make):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (make quality installs it)")
    model, batches, size = model_and_batches(make)
    versus(
        f"CPU scores of every head, {name}, {size}",
        lambda: hp.score(model, batches, ["gate_gradient", "fisher"], loss_fn=loss_of),
        {"Torch-Pruning's Taylor importance": torch_pruning_taylor(model, batches)},
        at_least=1.5, rounds=3, grad=True, memory=True,
    )  # fmt: skip
