import pytest
import torch
from tiny_decoders import FAMILIES, decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, llama, tokens
from torch import nn

import headprune as hp
from headprune.compat import prune_heads


def heads_of(model) -> dict[str, int]:
    return {site.name: site.head_map.query_heads for site in hp.attention_sites(model)}


def test_heads_are_numbered_as_in_the_original_over_all_calls():
    model, once = bert(), bert()
    prune_heads(model, {0: [1], 1: [2, 3]})
    prune_heads(model, {0: [1, 2], 1: {3, 0}})
    hp.cut(once, {"encoder.layer.0.attention": [0, 3], "encoder.layer.1.attention": [1]})
    assert torch.equal(model(tokens()).last_hidden_state, once(tokens()).last_hidden_state)


def test_a_loaded_model_knows_what_is_gone(tmp_path):
    model = bert()
    prune_heads(model, {1: [0]})
    hp.save(model, tmp_path / "model")
    again = hp.load(tmp_path / "model")
    prune_heads(again, {1: [0, 3]})
    assert again.config.headprune["sites"]["encoder.layer.1.attention"]["kept"] == [1, 2]


def test_grouped_heads_are_query_heads():
    model = llama()
    prune_heads(model, {1: [0, 1, 2, 7]})
    assert str(hp.attention_sites(model)[1].head_map) == "4q/3kv ragged 1+2+1"


SEVERAL = ("clip", "timesformer")  # stacks of layers, attentions in a layer


@pytest.mark.parametrize("name", [name for name in {**ENCODERS, **VISION} if name not in SEVERAL])
def test_every_encoder_has_its_layers(name):
    model = {**ENCODERS, **VISION}[name].make()
    before = heads_of(model)
    last = len(before) - 1
    prune_heads(model, {0: [0], last: [1, 2]})
    assert list(heads_of(model).values()) == [3, *[4] * (last - 1), 2]


def test_all_self_attentions_of_a_layer_lose_the_heads():
    model = VISION["timesformer"].make()
    prune_heads(model, {1: [0, 3]})
    assert list(heads_of(model).values()) == [4, 4, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_has_its_layers(family):
    model = decoder(family)
    prune_heads(model, {0: [0], 1: [1, 2]})
    prune_heads(model, {0: [3]})
    assert list(heads_of(model).values())[:2] == [2, 2]


@pytest.mark.parametrize(
    ("name", "within"), [("t5", "decoder"), ("bart", "model.decoder"), ("whisper", "model.encoder"), ("clip", "vision_model")]
)
def test_of_several_stacks_one_must_be_named(name, within):
    model = {**SEQ2SEQ, **VISION}[name].make()
    before = heads_of(model)
    with pytest.raises(hp.InvalidInput, match="within="):
        prune_heads(model, {1: [0]})
    prune_heads(model, {1: [0, 3]}, within=within)
    changed = [site for site, heads in heads_of(model).items() if heads != before[site]]
    assert len(changed) == 1
    assert changed[0].startswith(f"{within}.")
    assert next(site.kind for site in hp.attention_sites(model) if site.name == changed[0]) == "self"


def test_plain_torch_models_have_layers_too():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False)
    prune_heads(model, {1: [0]})
    prune_heads(model, {1: [0, 1]})
    assert heads_of(model) == {"layers.0.self_attn": 4, "layers.1.self_attn": 2}


@pytest.mark.parametrize(("heads", "reason"), [({2: [0]}, r"layer 2 .*\[0, 1\]"), ({0: [4]}, "query head 4 does not exist")])
def test_what_does_not_exist_is_refused(heads, reason):
    model = bert()
    with pytest.raises(hp.InvalidInput, match=reason):
        prune_heads(model, {1: [0], **heads})
    assert set(heads_of(model).values()) == {4}


@pytest.mark.parametrize("heads", [[0], None, {0: 3}, {0: "1"}, {0: [0.5]}])
def test_what_is_no_dict_of_heads_is_refused(heads):
    with pytest.raises(hp.InvalidInput, match="; expected "):
        prune_heads(bert(), heads)
