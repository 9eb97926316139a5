"""The warp-specialised forward for Hopper against torch's SDPA backends, FlexAttention and our plain Triton kernel.

bf16, 16k tokens in a batch (one sample above that), 2048 channels: the shapes of FlashAttention-3's figures. The first thing is a
call in a process of its own with a time limit: no row runs on a kernel that hangs.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from headprune import ops
from headprune.head_map import HeadMap

pytestmark = pytest.mark.gpu
TOKENS, CHANNELS = 16384, 2048
FLEX_LENGTH = 8192  # FlexAttention is compiled anew for every shape, which takes seconds: one length stands for all
TRIAL = """
import torch
from headprune import ops
query = torch.randn(2, 300, 4, {dim}, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
with ops.backend("gluon"):
    ops.attention(query, query, query, causal=True)
torch.cuda.synchronize()
"""


@cache
def trial(dim: int) -> str:
    """Why the kernel cannot be measured, or nothing."""
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs compute capability 9.0"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", TRIAL.format(dim=dim)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "the kernel hangs"
    return "" if done.returncode == 0 else done.stderr[-300:]


@pytest.fixture
def tensors(request):
    """(query, key, value) [batch, heads, length, dim], laid out token by token."""
    dim, length = request.getfixturevalue("dim"), request.getfixturevalue("length")
    reason = trial(dim)
    if reason:
        pytest.fail(reason) if "needs" not in reason else pytest.skip(reason)
    shape = (max(1, TOKENS // length), length, CHANNELS // dim, dim)
    return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))


def gflop(query: torch.Tensor, causal: bool) -> float:
    batch, heads, length, dim = query.shape
    return 4e-9 * batch * heads * length * length * dim / (2 if causal else 1)


def through(backend: str, *tensors: torch.Tensor, **options):
    def run():
        with ops.backend(backend):
            return ops.attention(*tensors, **options)

    return run


def sdpa(backend: SDPBackend, *tensors: torch.Tensor, **options):
    def run():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*tensors, **options)

    return run


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = query.shape[2]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cuda") if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask)


@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384, 32768])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("peers", ["flash", "best"])
def test_uniform_heads(versus, tensors, dim, causal, length, peers):
    query = tensors[0]
    flash = {"flash": sdpa(SDPBackend.FLASH_ATTENTION, *tensors, is_causal=causal)}
    best = {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, *tensors, is_causal=causal),
        **({"flex": flex(*tensors, causal)} if length == FLEX_LENGTH else {}),
        "triton": through("triton", *tensors, causal=causal),
    }
    goal = {("flash", 64): 1.2, ("best", 64): 0.9, ("flash", 128): 1.5, ("best", 128): 1.0}[peers, dim]
    versus(
        f"hopper forward d{dim} {'causal' if causal else 'full'} {length} / {peers}",
        through("gluon", *tensors, causal=causal),
        flash if peers == "flash" else best,
        dtype=torch.bfloat16,
        at_least=goal,
        gflop=gflop(query, causal),
    )


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "candidate"), [(64, 1), (64, 2), (128, 1)])
def test_tiles(versus, tensors, dim, causal, length, candidate):
    """The other tile sizes: one that is above 1 belongs into `hopper_launch.TILES`."""
    from headprune.kernels import hopper_launch

    query, key, value = tensors
    output, lse = torch.empty_like(query), torch.empty(query.shape[:3], device="cuda")
    kv_of_query = HeadMap.uniform(query.shape[1]).kv_of_query

    def with_tiles(tiles):
        return lambda: hopper_launch.attention_forward_hopper(
            query, key, value, output, lse, kv_of_query, causal=causal, scale=dim**-0.5, gate=None, tiles=tiles
        )

    tiles = hopper_launch.CANDIDATES[dim][candidate]
    versus(
        f"hopper tiles d{dim} {'causal' if causal else 'full'} {length} {tiles.block_n}x{tiles.stages}x{tiles.consumers}",
        with_tiles(tiles),
        {"default": with_tiles(hopper_launch.TILES[dim])},
        dtype=torch.bfloat16,
        gflop=gflop(query, causal),
    )
