"""A model whose torch attentions were swapped must give what it gave, on torch's fast paths too."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.models import attention_sites
from headprune.nn import VariableHeadAttention, replace_multihead_attention


def encoder(batch_first=True, layers=2, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells why it takes no nested tensors
        return nn.TransformerEncoder(layer, layers).eval()


def padded(batch_first=True):
    torch.manual_seed(1)
    x, padding = torch.randn(3, 6, 16), torch.arange(6).expand(3, -1) >= torch.tensor([6, 4, 2])[:, None]
    return (x if batch_first else x.transpose(0, 1)), padding


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"norm_first": True}, {"activation": "gelu"}])
def test_an_encoder_gives_what_it_gave(grad, options):
    """Without gradients torch's layer would run its fused kernel and the encoder nested tensors."""
    theirs = encoder(**options)
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    x, padding = padded(theirs.layers[0].self_attn.batch_first)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = ~padding if theirs.layers[0].self_attn.batch_first else ~padding.T
        for call in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}, {"mask": causal}):
            found, expected = ours(x, **call), theirs(x, **call)
            rows = seen if "src_key_padding_mask" in call else torch.ones_like(seen)
            assert torch.allclose(found[rows], expected[rows], atol=2e-6)


def test_a_single_layer_takes_a_swapped_attention_by_hand():
    layer = encoder().layers[0]
    x, padding = padded()
    expected = layer(x, src_key_padding_mask=padding)
    layer.self_attn = VariableHeadAttention.from_torch(layer.self_attn)
    with torch.no_grad():
        assert torch.allclose(layer(x, src_key_padding_mask=padding)[~padding], expected[~padding], atol=2e-6)
        layer.self_attn.prune([0, 2])
        assert layer(x).shape == x.shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_with_the_way_out():
    model = encoder()
    model.layers[0].self_attn = VariableHeadAttention.from_torch(model.layers[0].self_attn)
    x, padding = padded()
    with torch.no_grad(), pytest.raises(InvalidInput, match="use_nested_tensor = False"):
        model(x, src_key_padding_mask=padding)
    model.use_nested_tensor = False
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padding).shape == x.shape


def test_an_encoder_built_on_a_swapped_layer_declines_nested_tensors():
    layer = replace_multihead_attention(encoder().layers[0])
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
        assert not nn.TransformerEncoder(layer, 2).use_nested_tensor


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_and_decoder_give_what_they_gave():
    torch.manual_seed(0)
    theirs = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0).eval()
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    source, target = torch.randn(7, 2, 16), torch.randn(5, 2, 16)
    call = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "tgt_is_causal": True}
    assert torch.allclose(ours(source, target, **call), theirs(source, target, **call), atol=2e-6)
    assert not any(type(module) is nn.MultiheadAttention for module in ours.modules())


def test_a_shared_layer_stays_shared_and_a_subclass_stays():
    class Own(nn.MultiheadAttention):
        pass

    shared = nn.MultiheadAttention(8, 2)
    model = replace_multihead_attention(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": Own(8, 2)}))
    assert type(model["a"]) is VariableHeadAttention
    assert model["a"] is model["b"][0]
    assert type(model["c"]) is Own
    assert type(replace_multihead_attention(shared)) is VariableHeadAttention


class Mixer(nn.Module):
    """Two attentions of torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))

    def forward(self, x):
        x = self.first(x, x, x, need_weights=False)[0]
        return self.second(x, x, x, need_weights=False)[0]


def test_hooks_of_a_layer_go_on_and_their_handles_remove_them():
    model, x, seen = Mixer(), torch.randn(2, 5, 16), []
    handles = [
        model.first.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.first.register_forward_hook(lambda _module, _args, found: (2 * found[0], None)),
        model.first.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    expected = model(x)
    replace_multihead_attention(model)
    assert torch.allclose(model(x), expected, atol=1e-6)
    model(x).sum().backward()
    assert seen.count("before") == 3
    assert "backward" in seen
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model(x), expected, atol=1e-3)


def test_weights_that_layers_share_stay_shared():
    model = Mixer()
    model.second.in_proj_weight = model.first.in_proj_weight
    count = sum(parameter.numel() for parameter in model.parameters())
    replace_multihead_attention(model)
    assert model.first.q_proj.weight is model.second.q_proj.weight
    assert model.first.q_proj.bias is not model.second.q_proj.bias
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def masked(layer):
    prune.l1_unstructured(layer, "in_proj_weight", amount=0.5)


def parametrised(layer):
    parametrizations.weight_norm(layer.out_proj, "weight")


def by_hand(layer):
    layer.forward = lambda *args, **options: (args[0], None)


REFUSED = {
    masked: "holds in_proj_weight_orig beside its weights; undo masks",
    parametrised: r"holds out_proj.parametrizations.weight.original0 beside its weights; undo masks, .*remove_parametrizations",
    by_hand: r"has a forward that was set by hand, which may be another; .*VariableHeadAttention.from_torch",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_may_compute_something_else_stays_and_says_why_when_heads_are_asked_for(change):
    model, x = Mixer(), torch.randn(2, 5, 16)
    change(model.first)
    expected = model(x)
    replace_multihead_attention(model)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert isinstance(model.first, nn.MultiheadAttention)
    assert type(model.second) is VariableHeadAttention
    with pytest.raises(UnsupportedModel, match=rf"first \(MultiheadAttention\) {REFUSED[change]}"):
        attention_sites(model)


def test_a_subclass_and_a_model_that_is_torchs_layer_are_told_what_to_do():
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(UnsupportedModel, match=r"0 \(Own\) is a subclass of .*put .*from_torch\(layer\) in its place"):
        attention_sites(nn.Sequential(Own(8, 2)))
    with pytest.raises(UnsupportedModel, match=r"the model \(MultiheadAttention\) is torch's own .* returns"):
        attention_sites(nn.MultiheadAttention(8, 2))
    assert type(VariableHeadAttention.from_torch(Own(8, 2))) is VariableHeadAttention
