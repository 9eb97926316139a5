"""Forward attention on the CPU, fp32 and bf16."""

import pytest
import torch
from cpu_shapes import RAGGED, expanded_sdpa, rows
from torch.nn.functional import scaled_dot_product_attention

from headprune import HeadMap
from headprune.ops import attention, attention_varlen


@pytest.mark.parametrize("length", [64, 128, 256, 512])
@pytest.mark.parametrize("dim", [32, 64])
def test_encoder(versus, length, dim):
    batch, heads = 8, 12
    q, k, v = rows(batch, length, dim, HeadMap.uniform(heads))
    versus(
        f"CPU forward, encoder {heads} heads d{dim} S{length} batch {batch}", lambda: attention(q, k, v),
        {"SDPA": lambda: scaled_dot_product_attention(q, k, v)}, at_least=1.3 if length <= 128 else 1.0,
        gflop=4 * batch * heads * length * length * dim / 1e9,
    )  # fmt: skip


@pytest.mark.parametrize("length", [1024, 2048])
def test_decoder(versus, length):
    dim, heads, kv_heads = 128, 32, 8
    q, k, v = rows(1, length, dim, HeadMap.uniform(heads, kv_heads))
    versus(
        f"CPU forward, decoder {heads}/{kv_heads} heads d{dim} S{length} causal", lambda: attention(q, k, v, causal=True),
        {"SDPA enable_gqa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)}, at_least=1.0,
        gflop=2 * heads * length * length * dim / 1e9, rounds=7,
    )  # fmt: skip


@pytest.mark.parametrize("length", [512, 1024])
def test_ragged(versus, length):
    dim = 128
    q, k, v = rows(1, length, dim, RAGGED)
    versus(
        f"CPU forward, ragged 24/8 heads d{dim} S{length} causal", lambda: attention(q, k, v, RAGGED, causal=True),
        {"expand + SDPA": lambda: expanded_sdpa(q, k, v, RAGGED, is_causal=True)}, at_least=1.3,
        gflop=2 * RAGGED.query_heads * length * length * dim / 1e9,
    )  # fmt: skip


def test_encoder_in_bf16(versus):
    q, k, v = (tensor.bfloat16() for tensor in rows(8, 512, 64, HeadMap.uniform(12)))
    versus(
        "CPU forward, encoder 12 heads d64 S512 batch 8, bf16", lambda: attention(q, k, v),
        {"SDPA": lambda: scaled_dot_product_attention(q, k, v)}, dtype=torch.bfloat16, at_least=1.0,
        gflop=4 * 8 * 12 * 512 * 512 * 64 / 1e9,
    )  # fmt: skip


def test_ragged_in_bf16(versus):
    q, k, v = (tensor.bfloat16() for tensor in rows(1, 1024, 128, RAGGED))
    versus(
        "CPU forward, ragged 24/8 heads d128 S1024 causal, bf16", lambda: attention(q, k, v, RAGGED, causal=True),
        {"expand + SDPA": lambda: expanded_sdpa(q, k, v, RAGGED, is_causal=True)}, dtype=torch.bfloat16, at_least=1.3,
        gflop=2 * RAGGED.query_heads * 1024 * 1024 * 128 / 1e9,
    )  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
def test_statistics_on_and_off(versus, dim):
    q, k, v = rows(4, 512, dim, HeadMap.uniform(12))
    versus(
        f"CPU forward with statistics, 12 heads d{dim} S512 batch 4", lambda: attention(q, k, v, stats=True),
        {"without": lambda: attention(q, k, v)}, at_most=1.10,
    )  # fmt: skip


@pytest.mark.parametrize("kept", [4, 8, 12])
def test_pruned_to_some_heads(versus, kept):
    heads, dim = 16, 64
    q, k, v = rows(4, 512, dim, HeadMap.uniform(heads))
    few = [tensor[:, :kept].transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    versus(
        f"CPU forward, {kept} of {heads} heads d{dim} S512 batch 4", lambda: attention(*few),
        {"all heads": lambda: attention(q, k, v)}, at_most=1.08 * kept / heads,
    )  # fmt: skip


@pytest.mark.parametrize("dim", [32, 64])
def test_packed(versus, dim):
    lengths, heads = (512, 64, 200, 33, 128, 350, 17, 256), 12
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v = torch.randn(3, sum(lengths), heads, dim)

    def one_by_one():
        sequences = zip(*(tensor.split(lengths) for tensor in (q, k, v)))
        return torch.cat([scaled_dot_product_attention(*(x.transpose(0, 1) for x in one)).transpose(0, 1) for one in sequences])

    versus(
        f"CPU forward, {len(lengths)} packed sequences of {min(lengths)} to {max(lengths)}, {heads} heads d{dim}",
        lambda: attention_varlen(q, k, v, starts, starts), {"SDPA on each": one_by_one}, at_least=1.0,
        gflop=4 * heads * sum(length**2 for length in lengths) * dim / 1e9,
    )  # fmt: skip
