"""Under autocast every operator must compute in the region's dtype, and leave its options alone."""

from contextlib import nullcontext

import pytest
import torch

from headprune import ops
from headprune.head_map import HeadMap

RAGGED = HeadMap((0, 0, 1), 2)


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 2, 6, 8, dtype=dtype), torch.randn(2, 2, 6, 8, dtype=dtype)


def attention(q, k, v):
    options = {"bias": torch.linspace(-1, 1, 24).view(4, 6), "sinks": torch.tensor([0.1, 0.2, 0.3]), "gate": torch.full((3,), 0.5)}
    return ops.attention(q, k, v, RAGGED, causal=True, alibi_slopes=torch.full((3,), 0.01), **options)


def varlen(q, k, v):
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v)]
    starts_q, starts_k = torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)
    return ops.attention_varlen(*packed, starts_q, starts_k, RAGGED, max_seqlen_q=4, max_seqlen_k=6, causal=True)


def decode(q, k, v):
    return ops.attention_decode(q.detach(), k.detach(), v.detach(), torch.tensor([6, 3], dtype=torch.int32), RAGGED)


RUNS = {"attention": attention, "varlen": varlen, "decode": decode}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_that_of_cast_tensors(name, dtype):
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=dtype):
        found = RUNS[name](q, k, v)
    assert found.dtype == dtype
    assert torch.equal(found, RUNS[name](q.to(dtype), k.to(dtype), v.to(dtype)))


@pytest.mark.parametrize("name", RUNS)
def test_tensors_of_different_dtypes_meet_in_that_of_the_region(name):
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RUNS[name](q, k.bfloat16(), v).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="must agree"):
        RUNS[name](q, k.bfloat16(), v)


def test_doubles_stay_doubles():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*tensors(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["attention", "varlen"])
def test_gradients_come_back_in_the_dtype_of_the_leaves(name):
    leaves = [tensor.requires_grad_() for tensor in tensors()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        RUNS[name](*leaves).float().square().sum().backward()
    low = [tensor.bfloat16().detach().requires_grad_() for tensor in tensors()]
    RUNS[name](*low).float().square().sum().backward()
    for leaf, expected in zip(leaves, low):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected.grad.float())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_region_casts_as_eager_does(name, inside):
    """The region may stand inside the compiled function or around it."""
    region = lambda wanted: torch.autocast("cpu", dtype=torch.bfloat16) if wanted else nullcontext()  # noqa: E731

    def run(*leaves):
        with region(inside):
            return RUNS[name](*leaves) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        leaves = [tensor.requires_grad_(name != "decode") for tensor in tensors()]
        with region(not inside):
            output = function(*leaves)
        if name != "decode":
            output.float().sum().backward()
        results.append((output, *(leaf.grad for leaf in leaves if leaf.requires_grad)))
    assert results[1][0].dtype == torch.bfloat16
    assert all(torch.equal(found, expected) for found, expected in zip(*results))
