import copy

import pytest
import torch
from tiny_decoders import decoder
from tiny_models import bert, hidden, llama, padded
from torch import nn
from transformers import DebertaConfig, DebertaModel, SqueezeBertConfig, SqueezeBertModel

import headprune as hp
import headprune.models as models
from headprune.errors import InvalidInput, InvalidPlan, UnsupportedModel
from headprune.head_map import HeadMap


def test_llama_sites_have_their_names_and_groups():
    sites = models.attention_sites(llama())
    assert [site.name for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert sites[0].head_map == HeadMap.uniform(8, 4)
    assert (sites[0].head_dim, sites[0].hidden_size, sites[0].kind) == (8, 32, "self")


def test_bert_sites_reach_the_sibling_output_projection():
    site = models.attention_sites(bert())[1]
    assert site.name == "encoder.layer.1.attention"
    assert site.output.name == "encoder.layer.1.attention.output.dense"
    assert site.head_map == HeadMap.uniform(4)


def test_parameters_of_a_site_are_those_of_its_projections():
    site = models.attention_sites(bert())[0]
    # The output bias belongs to no head.
    whole = sum(p.numel() for name, p in site.module.named_parameters() if "LayerNorm" not in name)
    assert site.parameters() == whole - site.output.module.bias.numel()


def test_head_weights_are_the_rows_and_columns_of_the_head():
    site = models.attention_sites(llama())[0]
    q, o = site.projection("query"), site.output
    assert torch.equal(q.head_weights()[3], q.module.weight[24:32])
    assert torch.equal(o.head_weights()[3], o.module.weight[:, 24:32].T)


@pytest.mark.parametrize("make", [llama, bert])
def test_a_gate_at_zero_equals_zeroed_columns_of_the_output_projection(make):
    model, inputs = make(), padded()
    site = models.attention_sites(model)[0]
    with models.gated(model, {site.name: [1, 2]}):
        gated = hidden(model, **inputs)
    before = hidden(model, **inputs)
    removed = [column for column in range(site.output.features.numel()) if column not in site.columns((1, 2)).tolist()]
    site.output.module.weight.data[:, removed] = 0.0
    assert torch.allclose(gated, hidden(model, **inputs), atol=1e-6)
    assert not torch.allclose(gated, before, atol=1e-2)


def test_gating_an_unknown_site_names_the_nearest():
    with pytest.raises(InvalidPlan, match=r"model\.layers\.0\.self_attn"), models.gated(llama(), {"model.layers.0.self_atn": [0]}):
        pass
    with pytest.raises(InvalidInput, match="query head 8"), models.gated(llama(), {"model.layers.0.self_attn": [8]}):
        pass


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModel, match="no attention"):
        models.attention_sites(nn.Sequential(nn.Linear(4, 4)))


def test_an_unknown_attention_beside_known_ones_is_refused_by_name():
    model = bert()
    model.extra = nn.MultiheadAttention(8, 2)
    with pytest.raises(UnsupportedModel, match=r"extra \(MultiheadAttention\)"):
        models.attention_sites(model)


def test_a_wrapped_projection_is_refused():
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = type("LoraLinear", (nn.Linear,), {})(32, 64)
    with pytest.raises(UnsupportedModel, match="LoraLinear"):
        models.attention_sites(model)


class DeformableAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Linear(32, 8)


def test_an_unknown_kind_beside_known_ones_keeps_its_heads_and_is_told_of_once(caplog):
    model = bert()
    model.first, model.second = DeformableAttention(), DeformableAttention()
    for _ in range(3):
        assert len(models.attention_sites(model)) == 2
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "first (DeformableAttention), second (DeformableAttention)" in told[0]
    pruned = copy.deepcopy(model)
    hp.prune(pruned, hp.PruningPlan.from_keep(model, {"encoder.layer.0.attention": [1]}))
    with hp.gated(model, {"encoder.layer.0.attention": [1]}):
        expected = hidden(model, **padded())
    assert torch.allclose(hidden(pruned, **padded()), expected, atol=1e-5)
    assert torch.equal(pruned.first.offsets.weight, model.first.offsets.weight)


def test_an_unknown_kind_alone_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"no adapter knows 0 \(DeformableAttention\)"):
        models.attention_sites(nn.Sequential(DeformableAttention()))


def test_a_latent_attention_without_a_query_projection_that_is_known_is_refused_by_name():
    model = decoder("deepseek_v2")
    attention = model.model.layers[0].self_attn
    attention.q_up, attention.q_proj = attention.q_proj, None
    with pytest.raises(UnsupportedModel, match=r"no adapter knows model\.layers\.0\.self_attn \(DeepseekV2Attention\)"):
        models.attention_sites(model)


def test_a_norm_over_some_heads_is_refused_with_the_reason():
    model = llama()
    model.model.layers[0].self_attn.q_norm = nn.RMSNorm(24)
    with pytest.raises(UnsupportedModel, match=r"q_proj: its norm spans 24 features, neither one head \(8\) nor all of them"):
        models.attention_sites(model)


def test_heads_that_talk_to_each_other_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 16}
    with pytest.raises(UnsupportedModel, match="talking heads mix all heads"):
        models.attention_sites(DebertaModel(DebertaConfig(talking_head=True, **sizes)))


def test_projections_in_groups_are_refused_with_the_reason():
    sizes = {"vocab_size": 50, "embedding_size": 32, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.raises(UnsupportedModel, match=r"SqueezeBertSelfAttention\) projects by convolutions in 4 groups"):
        hp.attention_sites(SqueezeBertModel(SqueezeBertConfig(**sizes, num_hidden_layers=1)))


def test_what_an_adapter_gives_that_is_no_site_is_named(monkeypatch):
    class Wrong:
        name = "wrong"
        found: object = {"q": 1}

        def site(self, name, module):
            return self.found if type(module) is nn.Identity else None

        def after_cut(self, site, head_map, kept): ...

    monkeypatch.setattr(models.adapters, "_adapters", {"wrong": Wrong()})
    model = nn.Sequential(nn.Sequential(nn.Identity()))
    model[0][0].add_module("inside", nn.Linear(1, 1))
    with pytest.raises(InvalidInput, match=r"adapter 'wrong' gave \{'q': 1\} for 0\.0; expected an hp\.AttentionSite"):
        hp.attention_sites(model)
    site = hp.AttentionSite("0.0", model[0][0], model[0][0], HeadMap.uniform(2), 4, 4, 8, "self", ())
    with pytest.raises(InvalidInput, match="has no output projection: its adapter must name one of each role"):
        _ = site.output
