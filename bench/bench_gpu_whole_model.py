"""Serving on a GPU, Llama-3-8B shape, bf16, random weights: the pruned model beside the dense one, and what surgery takes.

The attention's share of the time falls with the heads; the rest of the model does not, so Amdahl's bound is in the row's name:
the ratio there would be with attention of no cost at all for the heads that went.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from bench_gpu_scoring import llama_3_8b, model_and_batches
from torch import nn
from transformers import StaticCache

from headprune.models import attention_sites
from headprune.surgery import cut

PROMPT, CACHE, BATCH = 4096, 4096, 8


def pruned_copy(model: nn.Module, fraction: float) -> nn.Module:
    """Query heads gone one by one, ragged."""
    drawn, small = random.Random(0), copy.deepcopy(model)
    heads = {site.name: site.head_map.query_heads for site in attention_sites(small)}
    keep = {name: sorted(drawn.sample(range(count), count - int(fraction * count))) for name, count in heads.items()}
    cut(small, keep, verify=False)
    return small


def bound(model: nn.Module, fraction: float) -> float:
    """Time of the dense model over that of one whose attentions lose `fraction` of all that they cost, by FLOPs of one token."""
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2) - model.embed_tokens.weight.numel()
    attention = sum(part.module.weight.numel() for site in attention_sites(model) for part in site.projections)
    return total / (total - fraction * attention)


@torch.inference_mode()
def prefill(model: nn.Module, ids: torch.Tensor):
    return model(input_ids=ids, use_cache=True).past_key_values


@torch.inference_mode()
def decode(model: nn.Module, ids: torch.Tensor, cache):
    """One more token for every sequence; the cache is as long as before afterwards."""
    model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    cache.crop(-1)


def in_a_graph(model: nn.Module, ids: torch.Tensor):
    """One more token for every sequence through a static cache, for a CUDA graph: the cache is as long as before at the start."""
    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 64)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    token = ids[:, -1:].clone()

    @torch.inference_mode()
    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        return model(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state

    return step


def prefill_and_decode(versus, dense: nn.Module, fraction: float, device: str, prompt: int, cache: int, batch: int) -> None:
    small = pruned_copy(dense, fraction)
    for model in (dense, small):
        model.set_attn_implementation("headprune")
    note = f"Llama-3-8B shape, {fraction:.0%} of the heads gone, bound {bound(dense, fraction):.2f}x"
    ids = torch.randint(dense.config.vocab_size, (1, prompt), device=device)
    versus(
        f"GPU prefill, {note}, 1 x {prompt}", lambda: prefill(small, ids), {"dense": lambda: prefill(dense, ids)},
        rounds=5, graphs=False,
    )  # fmt: skip
    many = torch.randint(dense.config.vocab_size, (batch, cache), device=device)
    caches = [prefill(model, many) for model in (small, dense)]
    versus(
        f"GPU decode, {note}, {batch} x {cache} cached", lambda: decode(small, many, caches[0]),
        {"dense": lambda: decode(dense, many, caches[1])}, rounds=5, graphs=False,
    )  # fmt: skip
    caches.clear()
    versus(
        f"GPU decode in a CUDA graph, {note}, {batch} x {cache} cached", in_a_graph(small, many),
        {"dense": in_a_graph(dense, many)}, rounds=5,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_prefill_and_decode_beside_the_dense_model(versus, fraction):
    dense, _ = model_and_batches(llama_3_8b(), (1, 8), "cuda")
    prefill_and_decode(versus, dense, fraction, "cuda", PROMPT, CACHE, BATCH)


@pytest.mark.gpu
def test_surgery_beside_a_copy_of_what_stays(versus):
    dense, _ = model_and_batches(llama_3_8b(), (1, 8), "cuda")
    stays = [part.module.weight.detach() for site in attention_sites(pruned_copy(dense, 0.5)) for part in site.projections]
    versus(
        "GPU surgery, Llama-3-8B shape, 50% of the heads gone, with the copy of the model that it is done on",
        lambda: pruned_copy(dense, 0.5),
        {"copy of the model and of what stays": lambda: (copy.deepcopy(dense), [weight.clone() for weight in stays])},
        rounds=3, graphs=False,
    )  # fmt: skip
