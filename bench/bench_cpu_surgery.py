"""Cutting half of the heads out of real shapes with random weights, on the CPU, against copying what stays."""

import copy
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headprune.evaluation.memory import peak_bytes
from headprune.models import attention_sites
from headprune.surgery import cut
from headprune.surgery.stand_in import stand_in

ROUNDS = 7
# Attentions alone matter: vocabulary and feed-forward are small, so that the model fits beside its copies.
SHAPES = {
    "Llama-3.2-1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "2 layers of Llama-3-8B": {"hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def model(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], intermediate_size=64, vocab_size=64, dtype=dtype)
    return LlamaForCausalLM(config).to(dtype).eval()


def another(whole: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in another model, to be cut."""
    twin, config = stand_in(whole, {}), copy.deepcopy(whole.config)
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = config
    return twin


def check_memory(whole: LlamaForCausalLM, keep: dict) -> None:
    """At no time more than the model and its largest projection."""
    model_bytes = sum(parameter.nbytes for parameter in whole.parameters())
    largest = max(projection.module.weight.nbytes for projection in attention_sites(whole)[0].projections)
    assert peak_bytes(lambda: cut(copy.deepcopy(whole), keep, verify=False)) <= model_bytes + largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_surgery(versus, shape, dtype):
    whole, generator = model(shape, dtype), random.Random(0)
    keep = {site.name: sorted(generator.sample(range(32), 16)) for site in attention_sites(whole)}
    small = another(whole)
    cut(small, keep, verify=False)
    check_memory(whole, keep)
    names = [projection.name for site in attention_sites(small) for projection in site.projections]
    kept = [small.get_submodule(name).weight.detach() for name in names]
    there = [torch.zeros_like(weight) for weight in kept]
    pool = [another(whole) for _ in range(ROUNDS + 3)]  # two calls to warm up, one for the benchmark fixture
    versus(
        f"CPU surgery, {shape} shape with random weights, 16 of 32 heads stay, {dtype}",
        lambda: cut(pool.pop(), keep, verify=False),
        {"clone of what stays": lambda: [weight.clone() for weight in kept]},
        at_least=0.5, reads=lambda: [target.copy_(weight) for target, weight in zip(there, kept)], rounds=ROUNDS,
    )  # fmt: skip
