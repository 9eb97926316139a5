"""Tiny models with their batches, and the slices of each head's weights written out by layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny_models import VOCABULARY, bert, llama, tokens
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from headprune.surgery import cut

RAGGED = [0, 1, 2, 5, 6]  # of 8 query heads over 4 key/value heads: groups of 2, 1, 1, 1


@dataclass(frozen=True)
class Case:
    """slices(tensors): for each query head (name of parameter -> tensor) -> its parts and their shares."""

    model: nn.Module
    site: str
    loss_fn: object = None

    def batches(self, count: int = 3, batch: int = 4) -> list[dict]:
        return [{"input_ids": tokens(batch, 10, seed), "labels": tokens(batch, 10, seed + 50)} for seed in range(count)]


def ragged_llama() -> Case:
    model = llama()
    model.set_attn_implementation("headprune")
    cut(model, {"model.layers.1.self_attn": RAGGED})
    return Case(model, "model.layers.1.self_attn")


def tiny_bert() -> Case:
    def loss_fn(model: nn.Module, batch: dict) -> Tensor:
        """Per sample."""
        hidden = model(input_ids=batch["input_ids"]).last_hidden_state
        return (hidden * torch.arange(hidden.shape[2]).sin()).square().mean(dim=(1, 2))

    return Case(bert(), "encoder.layer.1.attention", loss_fn)


def tiny_gpt2() -> Case:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(GPT2LMHeadModel(config).eval(), "transformer.h.1.attn")


CASES = {"ragged llama": ragged_llama, "bert": tiny_bert, "gpt2": tiny_gpt2}


def head_parts(case: Case, of) -> list[list[tuple[float, Tensor]]]:
    """For each query head its four slices of `of(weight)`, with the share that counts; written out by layout."""
    module = case.model.get_submodule(case.site)
    if isinstance(case.model, GPT2LMHeadModel):
        fused, out = of(module.c_attn.weight), of(module.c_proj.weight)  # [in, out]
        return [
            [*((1.0, fused[:, part * 32 + h * 8 : part * 32 + h * 8 + 8]) for part in range(3)), (1.0, out[h * 8 : h * 8 + 8])]
            for h in range(4)
        ]
    if hasattr(module, "q_proj"):
        q, k, v, o = (of(getattr(module, name).weight) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        groups, sizes = [0, 0, 1, 2, 3], [2, 1, 1, 1]
    else:
        inner = module.self
        q, k, v, o = (of(one.weight) for one in (inner.query, inner.key, inner.value, module.output.dense))
        groups, sizes = [0, 1, 2, 3], [1] * 4
    rows = lambda weight, head: weight[head * 8 : head * 8 + 8]  # noqa: E731
    return [
        [(1.0, rows(q, h)), (1 / sizes[g], rows(k, g)), (1 / sizes[g], rows(v, g)), (1.0, o[:, h * 8 : h * 8 + 8])]
        for h, g in enumerate(groups)
    ]
