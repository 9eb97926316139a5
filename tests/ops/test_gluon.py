"""The warp-specialised kernel behind the operator: what it refuses, and on a GPU whether it is right.

On a GPU every check runs in a process of its own with a time limit: a mistake in its barriers would hang the device.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from headprune import ops
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops import gluon, reference
from headprune.ops.call import AttentionCall

SECONDS = 120
RAGGED = HeadMap((0, 0, 0, 1, 2, 2, 2), 3)


def tokens(head_count: int, length: int, dim: int, dtype=torch.bfloat16, device="cpu") -> torch.Tensor:
    """[2, head_count, length, dim] as a projection leaves it: token by token."""
    return torch.randn(2, length, head_count, dim, device=device).to(dtype).transpose(1, 2)


def a_call(dim=64, value_dim=None, dtype=torch.bfloat16) -> AttentionCall:
    query, key, value = tokens(7, 5, dim, dtype), tokens(3, 9, dim, dtype), tokens(3, 9, value_dim or dim, dtype)
    return AttentionCall(
        query, key, value, RAGGED, causal=True, window=0, scale=0.1, softcap=0.0, bias=None, alibi_slopes=None, sinks=None,
        key_mask=None, query_mask=None, gate=None, stats=False,
    )  # fmt: skip


@pytest.mark.skipif(gluon.missing() is not None, reason=str(gluon.missing()))
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": 3}, "no window"),
        ({"softcap": 1.0, "sinks": torch.zeros(7)}, "no softcap, sinks"),
        ({"stats": True, "query_mask": torch.ones(2, 5).bool()}, "no query_mask"),
        ({"sinks": torch.zeros(7)}, "no sinks"),
        ({"key_mask": torch.ones(2, 9).bool()}, "no key_mask"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"query": tokens(7, 5, 80), "key": tokens(3, 9, 80), "value": tokens(3, 9, 80)}, "head_dim 80"),
        ({"value": tokens(3, 9, 128)}, "value_dim 128"),
        ({"query": tokens(7, 5, 64, torch.float32)}, "not torch.float32"),
        ({"query": tokens(7, 0, 64)}, "an empty dimension"),
        ({"key": tokens(3, 9, 65)[..., :64]}, "key's strides"),
        ({"value": tokens(3, 9, 72)[..., 1:65]}, "value's last dimension"),
        ({"key": tokens(3, 9, 128)[..., ::2]}, "key's last dimension"),
        ({"value": tokens(1, 9, 64).expand(2, 3, 9, 64)}, "value's strides"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(change, reason):
    assert gluon.unsupported(a_call()) is gluon.unsupported(replace(a_call(), stats=True)) is None
    assert reason in gluon.unsupported(replace(a_call(), **change))


@pytest.mark.skipif(gluon.missing() is not None, reason=str(gluon.missing()))
def test_it_runs_unasked_only_where_a_gpu_has_shown_it_right(monkeypatch):
    monkeypatch.setattr(gluon, "VERIFIED", frozenset())
    assert "not shown" in gluon.refuses(a_call())
    with ops.backend("gluon"):
        assert gluon.refuses(a_call()) == "runs on CUDA devices, not cpu"
    monkeypatch.setattr(gluon, "VERIFIED", frozenset({(64, True, False)}))
    assert gluon.refuses(a_call()) == "runs on CUDA devices, not cpu"
    assert "not shown" in gluon.refuses(a_call(dim=128))


def test_forcing_it_on_what_it_cannot_do_says_why():
    with ops.backend("gluon"), pytest.raises(InvalidInput, match=r"gluon: (runs on CUDA|.*riton)"):
        ops.attention(tokens(7, 5, 64), tokens(3, 9, 64), tokens(3, 9, 64), RAGGED)


LENGTHS = [(1, 1), (1, 300), (64, 64), (129, 129), (127, 1000), (257, 4097), (2048, 2048), (700, 300)]


def errors_on_gpu(dtype: str, dim: int, causal: bool, tiles: int, stats: bool) -> dict:
    """The largest error of the outputs over what is allowed, the largest error of lse, that of the statistics over what is
    allowed, and whether runs agree bit for bit."""
    from headprune.kernels import hopper_launch

    hopper_launch.TILES[dim] = hopper_launch.CANDIDATES[dim][tiles]
    worst, worst_lse, worst_stats, same = 0.0, 0.0, 0.0, True
    for q_len, kv_len in LENGTHS:
        torch.manual_seed(q_len)
        make = lambda heads, length: tokens(heads, length, dim, getattr(torch, dtype), "cuda")  # noqa: E731
        q, k, v = make(7, q_len), make(3, kv_len), make(3, kv_len)
        gate = torch.rand(2, 7, device="cuda")
        gate[0, 2] = gate[1, 6] = 0.0
        operands = (list(RAGGED.kv_of_query), causal, 0, 0.2, 0.0, None, None, None, None, None, gate, stats)
        with ops.backend("gluon"):
            runs = [torch.ops.headprune.attention(q, k, v, *operands) for _ in range(10)]
        output, lse, found = runs[0]
        same = same and all(all(map(torch.equal, runs[0], again)) for again in runs)
        keys, values = (tensor[:, list(RAGGED.kv_of_query)] for tensor in (k, v))
        visible = torch.ones(q_len, kv_len, device="cuda").tril(kv_len - q_len if causal else kv_len).bool()
        scores = (q.double() @ keys.double().transpose(2, 3) * 0.2).masked_fill(~visible, float("-inf"))
        exact = (scores.softmax(3) @ values.double() * gate.double()[..., None, None]).nan_to_num(0.0)  # rows without a key
        theirs = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=0.2) * gate[..., None, None].to(q.dtype)
        theirs = theirs.nan_to_num(0.0)
        allowed = 2 * (theirs - exact).abs().max() + 4 * torch.finfo(q.dtype).eps
        worst = max(worst, float((output - exact).abs().max() / allowed))
        on = gate != 0
        exact_lse = scores.logsumexp(3)[on]
        worst_lse = max(worst_lse, float((lse[on] - exact_lse)[exact_lse.isfinite()].abs().max()))
        same = same and bool((lse[on][exact_lse.isinf()] == float("-inf")).all())
        if stats:
            call = AttentionCall(
                q.double(), k.double(), v.double(), RAGGED, causal=causal, window=0, scale=0.2, softcap=0.0, bias=None,
                alibi_slopes=None, sinks=None, key_mask=None, query_mask=None, gate=gate.double(), stats=True,
            )  # fmt: skip
            true = reference.attention_forward(call)[2]
            error = (found - true).nan_to_num(0.0).abs() / (1e-4 + 1e-3 * true.nan_to_num(0.0, neginf=0.0).abs())
            worst_stats = max(worst_stats, float(error.max()))
            same = same and torch.equal(found.isinf(), true.isinf())
        same = same and bool((lse[~on] == float("-inf")).all() and (output[~on] == 0).all())
    return {"output": worst, "lse": worst_lse, "stats": worst_stats, "same": same}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim", "tiles", "stats"),
    [
        ("bfloat16", 64, 0, False), ("bfloat16", 64, 1, False), ("bfloat16", 64, 2, False), ("bfloat16", 128, 0, False),
        ("bfloat16", 128, 1, False), ("float16", 128, 0, False), ("bfloat16", 64, 0, True), ("bfloat16", 128, 0, True),
        ("float16", 128, 0, True),
    ],
)  # fmt: skip
def test_on_a_gpu_it_is_as_exact_as_pytorch_and_the_same_every_time(dtype, dim, causal, tiles, stats):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    script = f"import json, test_gluon as t; print(json.dumps(t.errors_on_gpu({dtype!r}, {dim}, {causal}, {tiles}, {stats})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["output"] <= 1.0
    assert found["lse"] <= 1e-3
    assert found["stats"] <= 1.0
    assert found["same"]
