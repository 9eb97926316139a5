"""Scoring on a GPU, Llama-3-8B shape, bf16, random weights: beside a plain backward pass and head masks with autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scoring_peers import Batch, head_mask_backward, loss_of, plain_backward
from torch import nn
from transformers import LlamaConfig, LlamaModel

import headprune as hp

BATCHES, SHAPE = 2, (2, 2048)  # 15 GB of weights and, for head masks, as much of gradients


def llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip


def model_and_batches(config: LlamaConfig, shape: tuple[int, int], device: str) -> tuple[nn.Module, list[Batch]]:
    """Built where it runs, in bf16, so that no fp32 copy ever exists."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaModel(config)
    finally:
        torch.set_default_dtype(default)
    model.config.use_cache = False
    drawn = [torch.randint(config.vocab_size, shape, device=device) for _ in range(BATCHES)]
    return model.to(device, torch.bfloat16).eval(), [{"input_ids": ids} for ids in drawn]


def scores_and_statistics(model: nn.Module, batches: Sequence[Batch]):
    return hp.score(model, batches, ["gate_gradient", "fisher", "entropy"], loss_fn=loss_of)


def scores_alone(model: nn.Module, batches: Sequence[Batch]):
    return hp.score(model, batches, ["gate_gradient", "fisher"], loss_fn=loss_of)


@pytest.fixture(scope="module")
def llama():
    yield model_and_batches(llama_3_8b(), SHAPE, "cuda")
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_gate_gradients_fisher_and_statistics_beside_a_backward_pass(versus, llama):
    versus(
        f"GPU scores and statistics, Llama-3-8B shape, {BATCHES} batches of {SHAPE[0]} x {SHAPE[1]} tokens",
        lambda: scores_and_statistics(*llama), {"plain forward + backward": lambda: plain_backward(*llama)},
        at_most=1.10, rounds=5, grad=True, memory=True, graphs=False,
    )  # fmt: skip


@pytest.mark.gpu
def test_gate_gradients_and_fisher_beside_head_masks(versus, llama):
    versus(
        f"GPU scores, Llama-3-8B shape, {BATCHES} batches of {SHAPE[0]} x {SHAPE[1]} tokens",
        lambda: scores_alone(*llama), {"head masks with autograd": lambda: head_mask_backward(*llama)},
        at_least=1.5, rounds=5, grad=True, memory=True, graphs=False,
    )  # fmt: skip
