"""The attention operator: the reference against PyTorch's own attention, and what torch.library asks of an operator."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from headprune import ops
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.backend import forced

RAGGED = HeadMap((0, 0, 0, 1, 2, 2, 2), 3)


def inputs(head_map=RAGGED, batch=2, q_len=5, kv_len=9, dim=16, value_dim=12, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    make = lambda heads, length, width: torch.randn(batch, heads, length, width, dtype=dtype)  # noqa: E731
    return make(head_map.query_heads, q_len, dim), make(head_map.kv_heads, kv_len, dim), make(head_map.kv_heads, kv_len, value_dim)


def expanded(head_map, *tensors):
    return [tensor[:, list(head_map.kv_of_query)] for tensor in tensors]


@pytest.mark.parametrize("head_map", [RAGGED, HeadMap.uniform(1), HeadMap.uniform(17, 1), HeadMap.uniform(131)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_sdpa_on_expanded_heads(head_map, causal):
    q, k, v = inputs(head_map)
    mask = torch.ones(5, 9).tril(4).bool() if causal else None
    expected = F.scaled_dot_product_attention(q, *expanded(head_map, k, v), attn_mask=mask)
    assert torch.allclose(ops.attention(q, k, v, head_map, causal=causal), expected, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_every_option_follows_its_definition(backend):
    q, k, v = inputs()
    slopes, sinks, bias = torch.rand(7).double(), torch.randn(7).double(), torch.randn(1, 7, 5, 9).double()
    key_mask = torch.rand(2, 9) > 0.4
    key_mask[1, :3] = False
    gate = torch.rand(2, 7).double()
    gate[0, 2] = 0.0
    keys, values = expanded(RAGGED, k, v)
    scores = 6.0 * torch.tanh(q @ keys.transpose(2, 3) * 0.3 / 6.0)
    ahead = torch.arange(9)[None] - (torch.arange(5)[:, None] + 4)
    scores = scores - slopes[:, None, None] * ahead.abs() + bias
    scores = scores.masked_fill(~((ahead <= 0) & (ahead > -3) & key_mask[:, None, None]), -math.inf)
    probs = torch.cat([scores, sinks[:, None, None].expand(2, 7, 5, 1)], dim=3).softmax(dim=3)[..., :-1]
    with ops.backend(backend):
        found, stats = ops.attention(
            q, k, v, RAGGED, causal=True, window=3, scale=0.3, softcap=6.0, bias=bias, alibi_slopes=slopes, sinks=sinks,
            key_mask=key_mask, gate=gate, stats=True,
        )  # fmt: skip
    assert torch.allclose(found, probs @ values * gate[..., None, None], atol=1e-12)
    rows = (probs.sum(3) > 0).double() * (gate != 0)[..., None]  # a head that is switched off has no statistics
    first = key_mask.int().argmax(dim=1)  # where padding is on the left, the first token behind it
    mean = lambda values: ((values * rows).sum(2) / rows.sum(2).clamp(min=1)).float()  # noqa: E731
    assert torch.allclose(stats.entropy, mean(-torch.xlogy(probs, probs).sum(3)), atol=1e-6)
    assert torch.allclose(stats.max_prob, mean(probs.amax(3)), atol=1e-6)
    assert torch.allclose(stats.max_logit, scores.amax((2, 3)).masked_fill(gate == 0, -math.inf).float(), atol=1e-6)
    assert torch.allclose(stats.first_mass, mean(torch.stack([probs[n, :, :, key] for n, key in enumerate(first)])), atol=1e-6)
    assert torch.allclose(stats.distance, mean((probs * ahead.abs()).sum(3)), atol=1e-5)
    assert torch.allclose(stats.output_norm, mean(found.norm(dim=3)), atol=1e-6)


def test_a_row_with_nothing_to_attend_to_gives_zero_and_masked_nan_does_no_harm():
    q, k, v = inputs()
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[0] = False
    key_mask[1, 4:] = False
    v[1, :, 5] = float("nan")
    k[1, :, 6] = float("inf")
    found = ops.attention(q, k, v, RAGGED, key_mask=key_mask)
    assert (found[0] == 0).all()
    assert torch.allclose(found[1:], ops.attention(q[1:], k[1:, :, :4], v[1:, :, :4], RAGGED), atol=1e-12)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_that_a_query_sees_are_not_made_to_nothing(backend, poison):
    q, k, v = (tensor.float() for tensor in inputs())
    q[1, 2, 3, 0] = poison
    with ops.backend(backend):
        found = ops.attention(q, k, v, RAGGED)
    assert found.isnan().any(dim=3).nonzero().tolist() == [[1, 2, 3]]


def test_the_statistics_of_a_head_with_nan_are_nan():
    q, k, v = inputs()
    k[1, 0, 3] = float("nan")
    with ops.backend("reference"):
        _, stats = ops.attention(q, k, v, RAGGED, stats=True)
    for values in vars(stats).values():
        assert values.isnan().tolist() == [[False] * 7, [True] * 3 + [False] * 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_nan_reaches_no_gradient(dtype):
    q, k, v = inputs(dtype=dtype)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[0], hidden[1, 4:] = True, True
    grads = []
    for filler in (0.0, float("nan"), float("inf")):
        leaves = [q, *(tensor.masked_fill(hidden[:, None, :, None], filler) for tensor in (k, v))]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        grads.append(torch.autograd.grad(ops.attention(*leaves, RAGGED, key_mask=~hidden).sum(), leaves))
    for clean, *poisoned in zip(*grads):
        assert clean.isfinite().all()
        assert all(torch.equal(clean, grad) for grad in poisoned)


def test_without_features_every_key_counts_alike():
    q, k, v = inputs(dim=0)
    expected = v.mean(dim=2, keepdim=True)[:, list(RAGGED.kv_of_query)].expand(-1, -1, 5, -1)
    assert torch.allclose(ops.attention(q, k, v, RAGGED), expected)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"q_len": 0}, {"kv_len": 0}, {"head_map": HeadMap((), 0)}])
def test_empty_inputs_give_empty_or_zero_outputs(shape):
    q, k, v = inputs(**shape)
    found = ops.attention(q, k, v, shape.get("head_map", RAGGED))
    assert found.shape == (*q.shape[:3], v.shape[3])
    assert (found == 0).all()


def test_gradients_are_right_with_a_learning_gate_at_zero():
    q, k, v = (tensor.requires_grad_() for tensor in inputs(q_len=3, kv_len=4, dim=4, value_dim=3))
    gate = torch.rand(2, 7).double()
    gate[0, 2] = 0.0
    bias, sinks = torch.randn(1, 7, 3, 4).double(), torch.randn(7).double()
    run = lambda q, k, v, bias, sinks, gate: ops.attention(q, k, v, RAGGED, causal=True, bias=bias, sinks=sinks, gate=gate)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v, bias.requires_grad_(), sinks.requires_grad_(), gate.requires_grad_()))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_row_without_keys_and_sink_gives_no_nan_to_the_sinks(backend):
    q, k, v = inputs(q_len=3, kv_len=4, dim=4, value_dim=3)
    sinks = torch.full((7,), float("-inf")).double().requires_grad_()
    mask = torch.tensor([[False] * 4, [True] * 4])
    with ops.backend(backend):
        ops.attention(q, k, v, RAGGED, sinks=sinks, key_mask=mask).sum().backward()
    assert (sinks.grad == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_row_of_the_lowest_number_attends_to_all_keys_alike(backend):
    q, k, v = inputs()
    bias = torch.zeros(5, 9).index_fill(0, torch.tensor([2]), torch.finfo(torch.float32).min)
    with ops.backend(backend):
        found = ops.attention(q.float(), k.float(), v.float(), RAGGED, bias=bias)
    torch.testing.assert_close(found[:, :, 2], v.mean(dim=2)[:, list(RAGGED.kv_of_query)].float())


def test_second_derivatives_are_right_where_one_tensor_is_all():
    x, gate = torch.randn(1, 2, 3, 4).double().requires_grad_(), torch.rand(2).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, gate: ops.attention(x, x, x, causal=True, gate=gate), (x, gate))


def test_the_operator_passes_opcheck_and_compiles_whole():
    q, k, v = inputs(dtype=torch.float32)
    arguments = (list(RAGGED.kv_of_query), True, 0, 0.25, 0.0, None, None, None, None, None, None, True)
    torch.library.opcheck(torch.ops.headprune.attention, (q.requires_grad_(), k, v, *arguments))
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v, RAGGED, causal=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), ops.attention(q, k, v, RAGGED, causal=True))


def test_the_output_is_laid_out_token_by_token():
    assert ops.attention(*inputs(), RAGGED).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"head_map": HeadMap.uniform(7)}, "key has shape"),
        ({"head_map": HeadMap((0, 1, 2), 3)}, "query has 7 heads"),
        ({"gate": torch.ones(3)}, "gate has shape"),
        ({"key_mask": torch.ones(2, 9)}, "key_mask is torch.float32"),
        ({"bias": torch.ones(2, 5, 5, 9)}, "bias has shape"),
        ({"bias": torch.ones(2, 7, 5, 9, dtype=torch.int64)}, "bias is torch.int64; expected a floating type"),
        ({"query": torch.ones(7, 5, 16)}, r"query has shape \[7, 5, 16\]; expected 4 dimensions \[batch, heads, length, dim\]"),
        (
            {"query": torch.ones(2, 7, 10, 16).double(), "causal": True},
            r"causal attention needs kv_len >= query_len .*; got 9 < 10",
        ),
        ({"window": -1}, "window is -1; expected how many"),
        ({"window": 2.5}, "window is 2.5; expected how many positions are seen, a whole number"),
        ({"window": 2**63}, "window is 9223372036854775808; expected how many"),
        ({"gate": torch.ones(7, dtype=torch.int64)}, "gate is torch.int64; expected a floating type"),
        ({"sinks": torch.ones(7, dtype=torch.complex64)}, "sinks is torch.complex64; expected a floating type"),
        ({"alibi_slopes": torch.ones(7, requires_grad=True)}, "alibi_slopes has no gradient; detach it"),
        ({"gate": torch.ones(7, device="meta")}, "gate is on meta, the query on cpu; they must agree"),
        ({"bias": torch.ones(5, 9, device="meta")}, "bias is on meta, the query on cpu"),
        (
            {name: torch.ones(1, 1, 1, 1, dtype=torch.int64) for name in ("query", "key", "value")},
            "are torch.int64; expected torch.f",
        ),
        ({name: torch.ones(1, 1, 1, 1, dtype=torch.complex64) for name in ("query", "key", "value")}, "are torch.complex64"),
        ({"query": torch.ones(7, 5, 16), "head_map": None}, r"query has shape \[7, 5, 16\]; expected 4 dimensions"),
        ({"query": torch.tensor(1.0)}, r"query has shape \[\]; expected 4 dimensions"),
        ({"query": torch.zeros(2, 7, 5, 16).to_sparse()}, "query is torch.sparse_coo; expected a dense tensor"),
        ({"key": torch.nested.nested_tensor([torch.zeros(3, 2, 16)] * 2, layout=torch.jagged)}, "key is nested; expected a dense"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, names):
    for backend in (nullcontext(), ops.backend("reference")):
        with backend, pytest.raises(InvalidInput, match=names):
            ops.attention(**{**dict(zip(("query", "key", "value"), inputs())), "head_map": RAGGED, **change})


def test_an_argument_that_it_has_not_is_named_as_python_does():
    with pytest.raises(TypeError, match=r"attention\(\) got an unexpected keyword argument 'is_causal'"):
        ops.attention(*inputs(), RAGGED, is_causal=True)


def test_an_unknown_backend_is_refused():
    with pytest.raises(InvalidInput, match="Did you mean 'triton'"), ops.backend("trition"):
        pass


def test_a_backend_is_forced_inside_its_block_alone():
    assert forced() is None
    with ops.backend("reference"):
        with ops.backend("cpp"):
            assert forced() == "cpp"
        assert forced() == "reference"
        with pytest.raises(KeyError), ops.backend("cpp"):
            raise KeyError
        assert forced() == "reference"
    assert forced() is None
