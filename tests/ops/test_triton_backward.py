"""The Triton backward kernels against the reference in fp64; no further from it than twice PyTorch in the same precision."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from headprune import ops
from headprune.head_map import HeadMap
from headprune.ops import reference
from headprune.ops.call import AttentionCall, VarlenCall, check_call, check_varlen

NAMES = ("query", "key", "value", "bias", "sinks", "gate")


def head_map(groups) -> HeadMap:
    return HeadMap(tuple(kv for kv, size in enumerate(groups) for _ in range(size)), len(groups))


def make_call(*options: str, dtype, device, groups=(2, 1), batch=1, q_len=53, kv_len=61, dim=16, value_dim=16) -> AttentionCall:
    """A random call with the named options switched on."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    heads = sum(groups)
    full = (batch, heads, q_len, kv_len)
    gate = 0.5 + torch.rand(batch, heads, generator=generator)
    chosen = {
        "causal": {"causal": True}, "window": {"window": 9}, "softcap": {"softcap": 1.5},
        "bias": {"bias": normal(*full).masked_fill(torch.rand(full, generator=generator) < 0.2, float("-inf"))},
        "row_bias": {"bias": normal(1, heads, 1, kv_len)},
        "bool_bias": {"bias": torch.rand(batch, 1, q_len, kv_len, generator=generator) < 0.6},
        "alibi": {"alibi_slopes": torch.rand(heads, generator=generator)}, "sinks": {"sinks": normal(heads)},
        "key_mask": {"key_mask": torch.rand(batch, kv_len, generator=generator) < 0.6},
        "padding": {"key_mask": torch.arange(kv_len)[None] >= 35 + torch.arange(batch)[:, None]},
        "gate": {"gate": gate[0]}, "sample_gate": {"gate": gate},
    }  # fmt: skip
    shapes = ((heads, q_len, dim), (len(groups), kv_len, dim), (len(groups), kv_len, value_dim))
    # Token by token, as a model's projections lie.
    tensors = [normal(batch, length, count, width).transpose(1, 2).to(dtype) for count, length, width in shapes]
    call = AttentionCall(*tensors, head_map(groups), False, 0, dim**-0.5, 0.0, None, None, None, None, None, None, False)
    for option in options:
        call = replace(call, **chosen[option])
    return check_call(on(call, device))


def on(call, device, dtype=None):
    """`call` on a device; with a dtype, query, key and value in it."""
    moved = {}
    for field in fields(call):
        value = getattr(call, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(device, dtype if dtype and field.name in ("query", "key", "value") else value.dtype)
    return replace(call, **moved)


def eager(call: AttentionCall) -> tuple[torch.Tensor, None, None]:
    """Attention in the query's own dtype, the softmax in fp32: what PyTorch models do without a kernel."""
    dtype = call.query.dtype
    key, value = (tensor[:, list(call.head_map.kv_of_query)] for tensor in (call.key, call.value))
    scores = call.query @ key.transpose(2, 3) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        scores = scores - (call.alibi_slopes[:, None, None] * reference.distances(call)).to(dtype)
    if call.bias is not None and call.bias.dtype != torch.bool:
        scores = scores + call.bias.to(dtype)
    allowed = reference.visible(call)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    probs = scores.float().softmax(dim=3)[..., : call.kv_len]
    output = probs.masked_fill(~allowed.any(3, keepdim=True), 0.0).to(dtype) @ value
    return output if call.gate is None else output * reference.per_sample(call.gate).to(dtype)[..., None, None], None, None


def gradients(call, grad_output, needs):
    """What the kernels give for a forward of the reference."""
    from headprune.ops.triton_backward import attention_backward, attention_varlen_backward

    packed = isinstance(call, VarlenCall)
    forward = reference.attention_varlen_forward if packed else reference.attention_forward
    run = attention_varlen_backward if packed else attention_backward
    output, lse, _ = forward(call)
    return run(call, grad_output, output, lse, needs)


def needed(call, names=NAMES) -> tuple[bool, ...]:
    values = (getattr(call, name) for name in names)
    return tuple(value is not None and value.dtype != torch.bool for value in values)


def check(call, needs=None, peer=eager, names=NAMES, clean=None) -> None:
    """`clean`: the call that the expectation comes from, where `call` holds NaN."""
    clean = call if clean is None else clean
    needs = needed(call, names) if needs is None else needs
    forward = reference.attention_varlen_forward if isinstance(call, VarlenCall) else reference.attention_forward
    device, dtype = call.query.device, call.query.dtype
    grad_output = torch.randn((*call.query.shape[:-1], call.value_dim), generator=torch.Generator().manual_seed(1))
    grad_output = grad_output.to(device, dtype)
    lse = forward(clean)[1]
    found = gradients(call, grad_output, needs)
    exact = reference.differentiate(forward, on(clean, device, torch.float64), names, needs, grad_output.double())
    theirs = reference.differentiate(peer, clean, names, needs, grad_output)
    for name, need, ours, true, other in zip(names, needs, found, exact, theirs):
        assert (ours is not None) == need, name
        if not need or not true.numel():
            continue
        assert ours.dtype == getattr(call, name).dtype, name
        assert ours.isfinite().all(), name
        error, allowed = (ours.double() - true).abs().max(), 2 * (other.double() - true).abs().max()
        # Eager attention does not go through a saved lse, whose own rounding is a relative error of every probability; a GPU's
        # exponential errs by two units in the last place.
        rounding = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest(lse)
        floor = rounding * max(1.0, true.abs().max())
        assert error <= allowed + floor, f"d{name}: {error:.2e} > {allowed:.2e} + {floor:.2e}"


def largest(lse: torch.Tensor) -> float:
    finite = lse[lse.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def alone(option):
    return lambda **where: check(make_call(*option.split("+"), **where))


def shaped(*options, **shape):
    return lambda **where: check(make_call(*options, **where, **shape))


def with_gate(values, needs=None):
    def run(**where):
        call = make_call("causal", "sinks", **where, batch=2, groups=(2, 2), q_len=20, kv_len=33)
        check(replace(call, gate=torch.tensor(values, device=where["device"])), needs)

    return run


def nan_where_masked(**where):
    call = make_call("padding", "causal", "sinks", **where, batch=2, q_len=61)
    key, value = call.key.clone(), call.value.clone()
    key[:, :, :30], value[:, :, 10:34] = float("nan"), float("inf")
    clean = replace(call, key=call.key.clone(), value=call.value.clone())
    check(replace(call, key=key, value=value), clean=clean)


def nan_outside_the_window(**where):
    call = make_call("causal", "window", **where, q_len=20)
    hide = torch.arange(61, device=where["device"]) < 33
    broken = replace(
        call, key=call.key.masked_fill(hide[:, None], float("nan")), value=call.value.masked_fill(hide[:, None], float("inf"))
    )
    check(broken, clean=call)


def nan_under_a_bias(*options, **where):
    call = make_call("bool_bias", *options, **where, batch=2, q_len=40)
    call.bias[..., 20:24] = False
    hide = ~call.bias.any(dim=2).squeeze(1)[:, None, :, None]
    broken = replace(call, key=call.key.masked_fill(hide, float("nan")), value=call.value.masked_fill(hide, float("inf")))
    check(broken, clean=call)


def lowest_bias(**where):
    """A row whose bias is the lowest number: what it gives cannot be told from its lse, but it is no NaN."""
    call = make_call("bias", "sinks", **where, q_len=20)
    call.bias[:, :, 3] = torch.finfo(torch.float32).min
    grad_output = torch.ones_like(call.empty_output())
    assert all(grad.isfinite().all() for grad in gradients(call, grad_output, needed(call)) if grad is not None)
    grad_output[:, :, 3] = 0.0
    exact = reference.attention_backward(on(call, call.query.device, torch.float64), grad_output.double(), needed(call))
    for ours, true in zip(gradients(call, grad_output, needed(call)), exact):
        assert ours is true is None or (ours.double() - true).abs().max() <= 64 * torch.finfo(call.query.dtype).eps


def everything_masked(**where):
    call = make_call("key_mask", "sinks", "gate", **where, batch=2)
    call.key_mask[0] = False
    check(call)


def only_the_gate(**where):
    call = make_call("causal", "gate", **where)
    check(call, (False, False, False, False, False, True))


def each_gradient_alone(**where):
    call = make_call("bias", "sinks", "gate", **where, q_len=20, kv_len=33)
    for index in range(6):
        check(call, tuple(index == other for other in range(6)))


def the_same_bits_twice(**where):
    call = make_call("causal", "bias", "sinks", "gate", **where, groups=(3, 1), q_len=40, kv_len=40)
    grad_output = torch.ones_like(call.empty_output())
    once, again = (gradients(call, grad_output, (True,) * 6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def odd_strides(**where):
    """A transposed query, an expanded gradient, values shared by all heads."""
    call = make_call("causal", **where, groups=(1, 1), q_len=20, kv_len=20)
    query = call.query.transpose(2, 3).contiguous().transpose(2, 3)
    call = replace(call, query=query, value=call.value[:, :1].expand(-1, 2, -1, -1))
    output = call.empty_output()
    found = gradients(call, output.new_ones(()).expand(output.shape), needed(call))
    exact = reference.attention_backward(on(call, call.query.device, torch.float64), torch.ones_like(output).double(), needed(call))
    for ours, true in zip(found[:3], exact[:3]):
        assert (ours.double() - true).abs().max() <= 8 * torch.finfo(call.query.dtype).eps


def rows_over_each_other(**where):
    """Keys one element apart, as `unfold` gives."""
    call = make_call(**where, q_len=9, kv_len=9)
    signal = call.key.flatten(2)[:, :, :24]
    check(replace(call, key=signal.unfold(2, 16, 1)))


def windows_beyond_all_keys(**where):
    """Positions are added to them in 32 bits."""
    for window in (2**31 - 1, 2**31, 2**63 - 1):
        check(replace(make_call("causal", **where, q_len=20, kv_len=33), window=window))
        check(replace(make_call(**where, q_len=20, kv_len=33), window=window))


def packed(**where):
    """Sequences of different lengths, two without queries or keys, one with more queries than keys, and tokens of nobody."""
    lengths_q, lengths_k = (20, 0, 1, 37, 3, 9), (20, 5, 40, 37, 0, 4)
    call = make_call("causal", "softcap", "alibi", "sinks", **where, q_len=sum(lengths_q) + 2, kv_len=sum(lengths_k) + 3)
    starts = [
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=where["device"]) for lengths in (lengths_q, lengths_k)
    ]
    gate = 0.5 + torch.rand(6, call.query_heads, generator=torch.Generator().manual_seed(2)).to(where["device"])
    gate[3, 0] = 0.0
    check_packed(call, starts, max(lengths_q), max(lengths_k), gate, window=7)
    check_packed(call, starts, max(lengths_q), max(lengths_k), gate[0], window=0)
    check_packed(call, starts, max(lengths_q), max(lengths_k), gate, window=0, needs=(False, False, False, True, True))


def check_packed(call, starts, max_q, max_k, gate, window, needs=None):
    tensors = [tensor[0].transpose(0, 1) for tensor in (call.query, call.key, call.value)]
    varlen = check_varlen(VarlenCall(
        *tensors, *starts, max_q, max_k, call.head_map, True, window, call.scale, call.softcap, call.alibi_slopes, call.sinks, gate,
        False,
    ))  # fmt: skip
    check(varlen, needs, peer=eager_varlen, names=reference.VARLEN_DIFFERENTIABLE)


def eager_varlen(call: VarlenCall):
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    output = call.query.new_zeros((call.query.shape[0], call.query_heads, call.value_dim))
    for index in range(call.sequences):
        (q0, q1), (k0, k1) = starts_q[index : index + 2], starts_k[index : index + 2]
        one = AttentionCall(
            call.query[q0:q1].transpose(0, 1)[None], call.key[k0:k1].transpose(0, 1)[None], call.value[k0:k1].transpose(0, 1)[None],
            call.head_map, call.causal, call.window, call.scale, call.softcap, None, call.alibi_slopes, call.sinks, None, None,
            call.gate if call.gate.dim() == 1 else call.gate[index], False,
        )  # fmt: skip
        if k1 > k0:
            output[q0:q1] = eager(one)[0][0].transpose(0, 1)
    return output, None, None


OPTIONS = ("", "causal", "window", "causal+window", "softcap", "bias", "row_bias", "bool_bias", "alibi", "sinks", "key_mask",
           "padding", "gate", "sample_gate")  # fmt: skip
PAIRS = (
    "causal+bias",
    "causal+padding",
    "softcap+bias",
    "alibi+key_mask",
    "window+sinks",
    "causal+softcap+gate",
    "bool_bias+key_mask+gate",
)
CASES = {
    **{f"option {option or 'none'}": alone(option) if option else shaped() for option in OPTIONS},
    **{f"options {pair}": alone(pair) for pair in PAIRS},
    "groups of 17 and 1": shaped("causal", groups=(1, 17), q_len=20, kv_len=20),
    "one head": shaped(groups=(1,), q_len=1, kv_len=1),
    "a group without heads": shaped(groups=(1, 0, 2), q_len=9, kv_len=17),
    "head_dim in two parts": shaped("causal", dim=80, value_dim=24, q_len=20, kv_len=33),
    "value_dim in two parts": shaped("sinks", dim=9, value_dim=96, q_len=20, kv_len=33),
    "two parts of odd widths": shaped("causal", "sample_gate", dim=40, value_dim=33, q_len=20, kv_len=33),
    "head_dim 256": shaped(dim=256, value_dim=256, groups=(1,), q_len=17, kv_len=17),
    "more queries than keys": shaped("alibi", q_len=40, kv_len=20),
    "gates at and near zero": with_gate([[0.0, 1e-30, -1.0, 0.7], [1e-3, 0.0, 0.0, 1e-5]]),
    "a closed group": with_gate([0.0, 0.0, 0.0, 2.0]),
    "gates at zero that do not learn": with_gate([0.0, -0.5, 0.0, 1.0], (True, True, True, False, True, False)),
    "NaN where masked": nan_where_masked, "NaN outside the window": nan_outside_the_window, "NaN under a bias": nan_under_a_bias,
    "NaN under a bias, softcap": lambda **where: nan_under_a_bias("softcap", **where),
    "lowest bias": lowest_bias,
    "a sample without keys": everything_masked, "only the gate": only_the_gate,
    "each gradient alone": each_gradient_alone, "determinism": the_same_bits_twice, "odd strides": odd_strides, "packed": packed,
    "rows over each other": rows_over_each_other, "windows beyond all keys": windows_beyond_all_keys,
}  # fmt: skip


def run_all() -> None:
    """Prints {case: what went wrong}, for every case in fp32 and fp16 on the CPU."""
    wrong = {}
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.float16):
            try:
                case(dtype=dtype, device="cpu")
            except Exception as error:
                wrong[name] = f"{dtype}: {type(error).__name__}: {error}"
    wrong |= in_regular_rows() | in_parts()
    print(json.dumps(wrong))


def in_regular_rows() -> dict[str, str]:
    """What goes wrong with the copies that Hopper needs, which the interpreter does not."""
    from headprune.kernels import attention_backward

    wrong, needed = {}, attention_backward.concerned
    attention_backward.concerned = lambda tensor: True
    for name in ("two parts of odd widths", "packed", "odd strides", "each gradient alone"):
        try:
            CASES[name](dtype=torch.float16, device="cpu")
        except Exception as error:
            wrong[name] = f"with copies: {error!r}"
    attention_backward.concerned = needed
    return wrong


def in_parts() -> dict[str, str]:
    """What goes wrong with more samples than a grid holds."""
    from headprune.kernels import attention_backward

    wrong, most = {}, attention_backward.MOST_SAMPLES
    attention_backward.MOST_SAMPLES = 2
    many = shaped("padding", "bool_bias", "sample_gate", "sinks", batch=5, q_len=9, kv_len=40)
    for name, case in {"packed": packed, "gates at and near zero": many, "option row_bias": shaped("row_bias", batch=3)}.items():
        try:
            case(dtype=torch.float32, device="cpu")
        except Exception as error:
            wrong[name] = f"in parts: {error!r}"
    attention_backward.MOST_SAMPLES = most
    return wrong


def test_more_samples_than_a_grid_holds_are_several_launches():
    pytest.importorskip("triton", reason="Triton is not installed")
    from headprune.kernels.attention_backward import parts_of

    assert parts_of(65535) == [slice(0, 65535)]
    assert parts_of(70000) == [slice(0, 65535), slice(65535, 70000)]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in Triton's interpreter, in a process of its own: the variable must be set before triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    script = "import test_triton_backward as t; t.run_all()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_the_interpreter_are_as_exact_as_pytorchs(interpreted, case):
    assert case not in interpreted, interpreted[case]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gradients_on_a_gpu_are_as_exact_as_pytorchs(case, dtype):
    CASES[case](dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_gradients_through_the_operator_on_a_gpu_at_the_sizes_of_real_layers(dim, dtype, causal):
    """Several tiles of each kernel, ragged groups, the forward that runs by default."""
    generator = torch.Generator(device="cuda").manual_seed(dim)
    heads = head_map((3, 1, 4))
    make = lambda count, length: torch.randn(2, length, count, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)  # noqa: E731
    tensors = [make(8, 413), make(3, 601), make(3, 601)]
    gate, grad_output = torch.arange(1, 17, device="cuda").view(2, 8) / 16, make(8, 413)  # gates that every dtype holds

    def differentiate(function, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors] + [gate.double().to(dtype).requires_grad_()]
        return torch.autograd.grad(function(*leaves), leaves, grad_output.to(dtype))

    def ours(q, k, v, gate):
        return ops.attention(q, k, v, heads, causal=causal, gate=gate.float())

    def plain(q, k, v, gate):
        index = list(heads.kv_of_query)
        visible = torch.ones(413, 601, device="cuda").tril(601 - 413 if causal else 601).bool()
        output = torch.nn.functional.scaled_dot_product_attention(q, k[:, index], v[:, index], attn_mask=visible)
        return output * gate[..., None, None]

    exact = differentiate(plain, torch.float64)
    for found, theirs, true in zip(differentiate(ours, dtype), differentiate(plain, dtype), exact, strict=True):
        allowed = 2 * (theirs.double() - true).abs().max() + 4 * torch.finfo(dtype).eps * max(1.0, true.abs().max())
        assert (found.double() - true).abs().max() <= allowed
