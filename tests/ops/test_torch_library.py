"""What torch.library asks of an operator, for every operator with every option, and modules that compile and export whole."""

import pytest
import torch
from torch import nn

from headprune import ops
from headprune.head_map import HeadMap

RAGGED = HeadMap((0, 0, 1), 2)
HEADS, KV_HEADS, DIM, VALUE_DIM = 3, 2, 8, 6


def heads(batch, length, count, dim, grad):
    return torch.randn(batch, count, length, dim, requires_grad=grad)


def attention_operands(options, grad):
    q, k, v = heads(2, 4, HEADS, DIM, grad), heads(2, 6, KV_HEADS, DIM, grad), heads(2, 6, KV_HEADS, VALUE_DIM, grad)
    if not options:
        return q, k, v, list(RAGGED.kv_of_query), False, 0, 0.3, 0.0, *[None] * 6, False
    bias, sinks, gate = torch.randn(1, HEADS, 4, 6), torch.randn(HEADS), torch.rand(2, HEADS)
    extras = [tensor.requires_grad_(grad) for tensor in (bias, sinks, gate)]
    key_mask, query_mask = torch.arange(6).expand(2, -1) > 0, torch.arange(4).expand(2, -1) < 3
    options = (True, 3, 0.3, 5.0, extras[0], torch.rand(HEADS), extras[1], key_mask, query_mask, extras[2], True)
    return q, k, v, list(RAGGED.kv_of_query), *options


def varlen_operands(options, grad):
    q = torch.randn(7, HEADS, DIM, requires_grad=grad)
    k, v = torch.randn(9, KV_HEADS, DIM, requires_grad=grad), torch.randn(9, KV_HEADS, VALUE_DIM, requires_grad=grad)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    lead = (q, k, v, *starts, 4, 5, list(RAGGED.kv_of_query))
    if not options:
        return *lead, False, 0, 0.3, 0.0, None, None, None, False
    sinks, gate = torch.randn(HEADS, requires_grad=grad), torch.rand(2, HEADS, requires_grad=grad)
    return *lead, True, 3, 0.3, 5.0, torch.rand(HEADS), sinks, gate, True


def decode_operands(options, grad):
    q, k, v = heads(2, 2, HEADS, DIM, False), heads(2, 6, KV_HEADS, DIM, False), heads(2, 6, KV_HEADS, VALUE_DIM, False)
    lengths = torch.tensor([6, 3], dtype=torch.int32)
    if not options:
        return q, k, v, lengths, None, list(RAGGED.kv_of_query), 0, 0.3, 0.0, None, None, None, None
    table, mask = torch.tensor([[1], [0]], dtype=torch.int32), torch.arange(6).expand(2, -1) > 0
    gate = torch.rand(2, HEADS)
    return q, k, v, lengths, table, list(RAGGED.kv_of_query), 3, 0.3, 5.0, torch.rand(HEADS), torch.randn(HEADS), mask, gate


OPERANDS = {"attention": attention_operands, "attention_varlen": varlen_operands, "attention_decode": decode_operands}


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_operators_pass_opcheck(name, options, grad):
    torch.manual_seed(0)
    torch.library.opcheck(getattr(torch.ops.headprune, name), OPERANDS[name](options, grad))


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
@pytest.mark.parametrize("options", [False, True])
def test_backward_operators_pass_opcheck(name, options):
    torch.manual_seed(0)
    operands = OPERANDS[name](options, False)
    output, lse, _ = getattr(torch.ops.headprune, name)(*operands)
    optional = [options] * (3 if name == "attention" else 2)
    backward = getattr(torch.ops.headprune, f"{name}_backward")
    torch.library.opcheck(backward, (torch.randn_like(output), output, lse, [True, False, True, *optional], *operands))


class Layer(nn.Module):
    """Each operator on the same projections."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operator = operator
        self.q, self.k, self.gate = nn.Linear(16, HEADS * DIM), nn.Linear(16, KV_HEADS * DIM), nn.Parameter(torch.rand(HEADS))
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x, key_mask):
        q, k = (projection(x).unflatten(2, (-1, DIM)) for projection in (self.q, self.k))
        if self.operator == "attention":
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            options = {"causal": True, "window": 3, "key_mask": key_mask, "gate": self.gate, "sinks": self.sinks, "stats": True}
            output, stats = ops.attention(q, k, k, RAGGED, **options)
            return output.transpose(1, 2).flatten(2), stats.entropy
        if self.operator == "attention_varlen":
            starts = torch.arange(0, x.shape[0] + 1, dtype=torch.int32) * x.shape[1]
            packed, keys = q.flatten(0, 1), k.flatten(0, 1)
            options = {
                "max_seqlen_q": x.shape[1],
                "max_seqlen_k": x.shape[1],
                "causal": True,
                "gate": self.gate,
                "sinks": self.sinks,
            }
            return ops.attention_varlen(packed, keys, keys, starts, starts, RAGGED, **options).flatten(1)
        k, lengths = k.transpose(1, 2), key_mask.sum(1).int()
        return ops.attention_decode(q[:, -1:].transpose(1, 2), k, k, lengths, RAGGED, gate=self.gate, sinks=self.sinks)


@pytest.mark.parametrize("operator", OPERANDS)
def test_a_module_compiles_whole_and_exports(operator):
    layer, inputs = Layer(operator), (torch.randn(2, 5, 16), torch.arange(5).expand(2, -1) < torch.tensor([[5], [3]]))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = layer(*inputs)
        torch.testing.assert_close(compiled(*inputs), expected)
        torch.testing.assert_close(torch.export.export(layer, inputs).module()(*inputs), expected)
    if operator == "attention_decode":
        return
    gradients = []
    for run in (layer, compiled):
        layer.zero_grad()
        output = run(*inputs)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients)


def test_batch_and_length_stay_dynamic_in_an_export():
    layer, inputs = Layer("attention"), (torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(layer, inputs, dynamic_shapes=(free, free))
    larger = (torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool))
    torch.testing.assert_close(exported.module()(*larger), layer(*larger))


def test_all_sizes_may_be_symbols_at_once():
    """With dynamic=True head_dim is one too, and with it the default scale."""

    def attend(q, k, v, key_mask, sinks, gate):
        return ops.attention(q, k, v, RAGGED, causal=True, key_mask=key_mask, sinks=sinks, gate=gate)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length, dim in ((2, 5, 8), (3, 4, 7)):
        q, k, v = (
            heads(batch, 4, HEADS, dim, True),
            heads(batch, length, KV_HEADS, dim, True),
            heads(batch, length, KV_HEADS, 6, True),
        )
        extras = torch.arange(length).expand(batch, -1) > 0, torch.randn(HEADS), torch.rand(batch, HEADS)
        assert torch.equal(compiled(q, k, v, *extras), attend(q, k, v, *extras))
