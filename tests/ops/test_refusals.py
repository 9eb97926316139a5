"""Which calls the GPU backends refuse, and the reason that `headprune doctor` then prints; asked without a GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headprune.head_map import HeadMap
from headprune.ops import HeadSlices, cuda, cuda_weights, gluon, triton, triton_decode, triton_weights
from headprune.ops.call import AttentionCall, DecodeCall
from headprune.ops.weight_slices import WeightCall

HALF = torch.float16


def attention(dim: int = 64, value_dim: int = 64, dtype: torch.dtype = HALF, queries: int = 4, keys: int = 600) -> AttentionCall:
    query, key, value = (
        torch.zeros(1, heads, length, width, dtype=dtype)
        for heads, length, width in ((4, queries, dim), (2, keys, dim), (2, keys, value_dim))
    )
    return AttentionCall(
        query, key, value, HeadMap.uniform(4, 2), True, 0, 0.125, 0.0, None, None, None, None, None, None, False
    )  # fmt: skip


def decode(dim: int = 64, dtype: torch.dtype = HALF, cache: Tensor | None = None) -> DecodeCall:
    keys = torch.zeros(1, 2, 16, dim, dtype=dtype) if cache is None else cache
    query = torch.zeros(1, 4, 1, dim, dtype=dtype)
    return DecodeCall(
        query, keys, keys, torch.tensor([16]), None, HeadMap.uniform(4, 2), 0, 0.125, 0.0, None, None, None, None
    )  # fmt: skip


def weights(dtype: torch.dtype) -> WeightCall:
    return WeightCall.of([HeadSlices.contiguous(torch.zeros(8, 4, dtype=dtype), 2, 4)], [])


def test_tensors_on_the_cpu_are_for_others():
    assert triton.refuses(attention()) == "a cpu tensor"
    assert triton_decode.refuses(decode()) == cuda.refuses(decode()) == cuda.slower(decode()) == "a cpu tensor"
    assert triton_weights.refuses(weights(HALF)) == cuda_weights.refuses(weights(HALF)) == "a cpu tensor"
    assert cuda_weights.slower(weights(HALF)) == "a cpu tensor"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (attention(), None),
        (attention(dtype=torch.float64), "torch.float64 is not supported"),
        (attention(dtype=torch.bfloat16), "bf16 is wrong in Triton's interpreter"),
        (attention(dim=257), "head_dim 257 and value_dim 64; the kernel takes 1 to 256"),
        (attention(value_dim=300), "head_dim 64 and value_dim 300; the kernel takes 1 to 256"),
    ],
)
def test_triton_takes_what_its_tiles_hold(monkeypatch, call, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refuses(call) == reason


def test_tritons_decode_reads_caches_row_by_row_and_takes_attentions_of_few_queries_on_many_keys(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_decode.refuses(decode()) is None
    assert triton_decode.refuses(decode(dtype=torch.float64)) == "torch.float64 is not supported"
    assert triton_decode.refuses(decode(dtype=torch.bfloat16)) == "bf16 is wrong in Triton's interpreter"
    assert triton_decode.refuses(decode(dim=320)) == "head_dim above 256"
    across = torch.zeros(1, 2, 64, 16, dtype=HALF).transpose(2, 3)
    assert triton_decode.refuses(decode(cache=across)) == "the last stride of the key cache is 16, not 1"
    assert triton_decode.refuses_attention(attention()) is None
    for call, reason in [
        (attention(queries=9), "up to 8 queries on 512 keys"),
        (attention(keys=100), "up to 8 queries on 512 keys"),
        (replace(attention(), causal=False), "decode is causal"),
        (replace(attention(), stats=True), "no statistics"),
        (replace(attention(), bias=torch.zeros(1, 1, 4, 600)), "no bias"),
    ]:
        assert reason in triton_decode.refuses_attention(call)


def test_gpus_whose_shared_memory_is_too_small_are_for_others(monkeypatch):
    gpu = torch.device("cuda", 0)
    for module in (triton, cuda):
        monkeypatch.setattr(module, "capability_of", lambda device: 75)
    assert triton.unsuited(gpu) == cuda.unsuited(gpu) == "runs on compute capability 8.0 and newer, not 7.5"
    for module in (triton, cuda):
        monkeypatch.setattr(module, "capability_of", lambda device: 89)
    monkeypatch.setattr(cuda, "shared_bytes", lambda device: 99 << 10)
    assert triton.unsuited(gpu) is cuda.unsuited(gpu) is cuda.unsuited(gpu, 96) is None
    assert cuda.unsuited(gpu, 128) == "head_dim 128 takes 108848 bytes of shared memory, this GPU has 101376"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton.unsuited(gpu) == "has tiles for NVIDIA's GPUs alone"
    assert gluon.missing.__wrapped__() == "runs on NVIDIA's GPUs alone"


def test_rows_too_far_apart_for_32_bits_are_copied_and_in_a_cache_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    near, far = (torch.empty_strided((1, 1, 9, 64), (1, 1, step, 1), device="meta") for step in (1 << 24, 1 << 25))
    assert triton.dense_rows(near) is near
    assert triton.dense_rows(far).is_contiguous()
    assert triton.dense_rows(far[0, 0, :, None], 0).is_contiguous()
    assert triton_decode.strided("key", near) is None
    assert triton_decode.strided("key", far) == "the keys of the key cache are 33554432 elements apart, more than 16777216"


def test_the_cuda_decode_takes_half_precision_and_aligned_rows_of_known_width():
    assert cuda.refuses_tensors(decode()) is None
    assert cuda.refuses_tensors(decode(dtype=torch.float32)) == "runs fp16 and bf16, not torch.float32"
    assert "runs head_dim 64, 96 and 128" in cuda.refuses_tensors(decode(dim=80))
    apart = torch.zeros(1, 2, 16, 68, dtype=HALF)[..., :64]
    assert "the rows of key_cache are not 16-byte aligned" in cuda.refuses_tensors(decode(cache=apart))


def test_the_kernel_for_hopper_runs_where_it_was_verified_and_says_what_it_does_not_do():
    assert gluon.refuses(attention(dim=128, value_dim=128)) == "runs on CUDA devices, not cpu"
    for unshown in (attention(), replace(attention(dim=128, value_dim=128), stats=True)):
        assert gluon.refuses(unshown) == "not shown right and faster on a GPU; ops.backend('gluon') forces it"
    assert gluon.unsupported(attention()) is None
    for call, reason in [
        (attention(dtype=torch.float32), "runs bf16 and fp16, not torch.float32"),
        (attention(dim=96, value_dim=96), "head_dim 96 with value_dim 96 (64 or 128, both the same)"),
        (attention(queries=0), "an empty dimension"),
        (replace(attention(), scale=-1.0), "scale -1.0 (above 0)"),
        (replace(attention(), window=4, sinks=torch.zeros(4)), "no window, sinks"),
    ]:
        assert gluon.unsupported(call) == reason
