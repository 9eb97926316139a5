"""Scoring on a GPU, Llama-3-8B shape, bf16, random weights: beside a plain backward pass and head masks with autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scoring_peers import Batch, head_mask_backward, loss_of, plain_backward
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedConfig, Qwen3Config, Qwen3ForCausalLM

import headprune as hp
from headprune.models.checkpointing import checkpointed

BATCHES, SHAPE = 4, (2, 2048)  # 15 GB of weights and, for head masks, as much of gradients


def llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip


def model_and_batches(
    config: PreTrainedConfig, shape: tuple[int, int], device: str, kind: type[nn.Module] = LlamaModel
) -> tuple[nn.Module, list[Batch]]:
    """Built where it runs, in bf16, so that no fp32 copy ever exists."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = kind(config)
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
        at_most=1.10, rounds=3, grad=True, memory=True, graphs=False,
    )  # fmt: skip


@pytest.mark.gpu
def test_gate_gradients_and_fisher_beside_head_masks(versus, llama):
    versus(
        f"GPU scores, Llama-3-8B shape, {BATCHES} batches of {SHAPE[0]} x {SHAPE[1]} tokens",
        lambda: scores_alone(*llama), {"head masks with autograd": lambda: head_mask_backward(*llama)},
        at_least=1.5, rounds=3, grad=True, memory=True, graphs=False,
    )  # fmt: skip


def llama_2_7b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, head_dim=128, vocab_size=32000
    )


def qwen3_32b() -> Qwen3Config:
    return Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=8192,
    )  # fmt: skip


MEMORY = {
    "Llama-3-8B": (llama_3_8b, LlamaForCausalLM, lambda weights: 1.25 * weights),
    "Llama-2-7B": (llama_2_7b, LlamaForCausalLM, lambda _: 24e9),
    "Qwen3-32B": (qwen3_32b, Qwen3ForCausalLM, lambda weights: 1.25 * weights),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MEMORY)
def test_memory(versus, name):
    """Fisher scores of 4 x 2048 tokens with the loss over the vocabulary: weights and everything else at most so many bytes."""
    config, kind, most = MEMORY[name]
    model, batches = model_and_batches(config(), (4, 2048), "cuda", kind)
    batch = {**batches[0], "labels": batches[0]["input_ids"]}
    weights = sum(parameter.nbytes for parameter in model.parameters())

    def plain() -> None:
        with checkpointed(model.model):
            plain_backward(model.model, batches[:1])

    row = versus(
        f"GPU Fisher scores, {name} shape, {weights / 1e9:.1f} GB of weights, 4 x 2048 tokens, checkpointing",
        lambda: hp.score(model, [batch], "fisher", loss_fn=hp.causal_losses, checkpointing=True),
        {"plain forward + backward of the trunk, checkpointing": plain}, rounds=2, grad=True, memory=True, graphs=False,
    )  # fmt: skip
    assert row is None or weights + 1e6 * row.peak_mb["ours"] <= most(weights)
