"""A model whose torch attentions were swapped must give what it gave, on torch's fast paths too."""

import copy
import warnings

import pytest
import torch
from torch import nn

from headprune.errors import InvalidInput
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
