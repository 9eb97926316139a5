"""A gate put on a module from outside reaches every way in which our attention is computed."""

import pytest
import torch
from tiny_models import bert, tokens
from torch import nn

from headprune.models import attention_sites
from headprune.models.watching import through_headprune
from headprune.nn import VariableHeadAttention
from headprune.ops.gate import GATE, gate_of, gated_attention
from headprune.schedules.gates.reach import gates_in_place

TINY = 1e-9  # a dropout that drops nothing, but takes its own way


@pytest.mark.parametrize("dropout", [0.0, TINY])
def test_in_transformers_with_and_without_dropout(dropout):
    model = bert()
    sites = {site.name: site for site in attention_sites(model)}
    for site in sites.values():
        site.dispatcher.dropout.p = dropout
    gates = {name: torch.tensor([0.0, 0.5, 1.0, 2.0]) for name in sites}
    model.train()
    with through_headprune(model), torch.no_grad():
        found = []
        for operator in (frozenset(sites), frozenset()):
            with gates_in_place(sites, operator, gates):
                found.append(model(input_ids=tokens()).last_hidden_state)
        open_heads = model(input_ids=tokens()).last_hidden_state
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], open_heads, atol=1e-3)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout", [0.0, TINY])
@pytest.mark.parametrize("own", [False, True])
def test_in_our_module_in_every_way(need_weights, dropout, own):
    torch.manual_seed(0)
    layer = VariableHeadAttention(16, 4, dropout=dropout, batch_first=True, gate=own)
    gate, x = torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.randn(2, 5, 16)
    with gated_attention(layer, gate):
        found = layer(x, x, x, need_weights=need_weights)[0]
    expected = VariableHeadAttention(16, 4, batch_first=True, gate=True)
    expected.load_state_dict({**layer.state_dict(), "gate": gate})
    assert torch.allclose(found, expected(x, x, x, need_weights=False)[0], atol=1e-6)
    assert not hasattr(layer, GATE)


def test_gates_nest_and_multiply_with_a_modules_own():
    layer, outer, inner = nn.Identity(), torch.tensor([2.0]), torch.tensor([3.0])
    assert gate_of(layer) is None
    with gated_attention(layer, outer):
        with gated_attention(layer, inner):
            assert gate_of(layer, torch.tensor([5.0])) == 15
        assert gate_of(layer) is outer
    assert gate_of(layer, inner) is inner
    with pytest.raises(RuntimeError), gated_attention(layer, outer):
        raise RuntimeError
    assert gate_of(layer) is None
