"""Scoring on the CPU: what it costs beside a plain backward pass, and beside head masks with autograd."""

from contextlib import ExitStack

import pytest
import torch
from transformers import BertConfig, BertModel

import headprune as hp
from headprune.models import attention_sites
from headprune.scoring.observe import frozen
from headprune.sources import open_model

NEEDS = {"gate_gradient", "attention"}


def minilm():
    return open_model("minilm")[0], (16, 64)


def bert_base():
    """Random weights in BERT-base's shape, for speed alone."""
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval(), (2, 64)


def loss_of(model, batch):
    return model(**batch).last_hidden_state.square().mean(dim=(1, 2))


def plain_backward(model, batch) -> None:
    """Forward and backward with frozen weights: the gradient goes through every layer, from the embeddings on."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    with frozen(model):
        loss_of(model, batch).sum().backward()
    handle.remove()


def head_mask_backward(model, batch) -> None:
    """As transformers 4 did it: a mask of ones on every head's output, weights that ask for gradients, as they do by default."""
    masks = []
    with ExitStack() as stack:
        for site in attention_sites(model):
            mask, columns = torch.ones(site.head_map.query_heads, requires_grad=True), site.head_of_column()
            hook = lambda _module, args, mask=mask, columns=columns: (args[0] * mask[columns], *args[1:])  # noqa: E731
            stack.callback(site.output.module.register_forward_pre_hook(hook).remove)
            masks.append(mask)
        loss_of(model, batch).mean().backward()
    model.zero_grad(set_to_none=True)


MODELS = pytest.mark.parametrize(("name", "make"), [("MiniLM", minilm), ("BERT-base shape, random weights", bert_base)])


BATCHES = 4  # a calibration set, if a small one: what is done once for all batches counts as it does in use


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
        {"plain forward + backward": lambda: [plain_backward(model, batch) for batch in batches]},
        at_most=1.10, rounds=3, grad=True,
    )  # fmt: skip


@MODELS
def test_gate_gradients_and_fisher_beside_head_masks(versus, name, make):
    model, batches, size = model_and_batches(make)
    versus(
        f"CPU scores, {name}, {size}", lambda: hp.score(model, batches, ["gate_gradient", "fisher"], loss_fn=loss_of),
        {"head masks with autograd": lambda: [head_mask_backward(model, batch) for batch in batches]},
        at_least=1.5, rounds=3, grad=True,
    )  # fmt: skip
