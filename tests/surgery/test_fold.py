"""Gates folded into output projections: the model without gates gives what it gave with them."""

import pytest
import torch
from tiny_models import bert, hidden, llama, tokens
from torch import nn
from torch.nn.utils import prune as masks
from transformers import GPT2Config, GPT2LMHeadModel

import headprune as hp
from headprune.errors import InvalidInput, UnsupportedModel
from headprune.models import attention_sites
from headprune.nn import replace_multihead_attention
from headprune.schedules.gates.reach import gates_in_place
from headprune.surgery import cut, fold_gates


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=64, initializer_range=0.2)).eval()


def ragged():
    model = llama()
    cut(model, {attention_sites(model)[0].name: [0, 1, 2, 5, 7]})
    return model


@pytest.mark.parametrize("build", [bert, llama, gpt2, ragged])
def test_the_folded_model_gives_what_the_gated_one_gave(build):
    model, ids = build(), tokens()
    sites = {site.name: site for site in attention_sites(model)}
    gates = {name: torch.linspace(-0.5, 1.5, site.head_map.query_heads) for name, site in sites.items()}
    with gates_in_place(sites, frozenset(), gates):
        expected = hidden(model, input_ids=ids)
    assert not torch.allclose(hidden(model, input_ids=ids), expected, atol=1e-3)
    fold_gates(model, gates)
    assert torch.allclose(hidden(model, input_ids=ids), expected, atol=1e-5)


def test_open_gates_touch_nothing_and_closed_ones_are_what_gating_is():
    model, ids = bert(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [site.name for site in attention_sites(model)]
    fold_gates(model, {name: torch.ones(4) for name in names})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with hp.gated(model, {names[0]: [0, 3]}):
        expected = hidden(model, input_ids=ids)
    fold_gates(model, {names[0]: torch.tensor([1.0, 0.0, 0.0, 1.0])})
    assert torch.allclose(hidden(model, input_ids=ids), expected, atol=1e-6)


def test_layers_of_plain_torch_are_swapped_and_folded():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 16)
    fold_gates(encoder, {"layers.0.self_attn": torch.tensor([0.0, 1.0])})
    folded = encoder(x)
    replace_multihead_attention(encoder)
    cut(encoder, {"layers.0.self_attn": [1]})
    assert torch.allclose(encoder(x), folded, atol=1e-6)


def test_gates_that_do_not_fit_are_refused_and_nothing_is_changed():
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = {attention_sites(model)[0].name: torch.zeros(4)}
    for name, heads, told in (("encoder.layer.9.attention", 4, "layer.9"), ("encoder.layer.1.attention", 3, "of 4 finite")):
        with pytest.raises(InvalidInput, match=told):
            fold_gates(model, {**good, name: torch.ones(heads)})
    with pytest.raises(InvalidInput, match="finite"):
        fold_gates(model, {**good, "encoder.layer.1.attention": torch.tensor([1.0, float("nan"), 1.0, 1.0])})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gates_are_not_folded_into_weights_that_are_made_anew_or_are_others_too():
    gates = {"model.layers.0.self_attn": torch.zeros(8)}
    model = llama()
    masks.random_unstructured(model.model.layers[0].self_attn.o_proj, "weight", 0.3)
    with pytest.raises(UnsupportedModel, match=r"the weight of .*o_proj is made of others at each call"):
        fold_gates(model, gates)
    model = llama()
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    with pytest.raises(UnsupportedModel, match=r"o_proj is also model\.layers\.1\.self_attn\.o_proj"):
        fold_gates(model, gates)
