"""The whole way for plain torch modules: swap, score, plan, prune, keep."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headprune as hp
from headprune.errors import UnsupportedModel


class Classifier(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        self.batch_first = batch_first

    def forward(self, x):
        hidden = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.head(hidden.mean(dim=1 if self.batch_first else 0))


def model(**options) -> nn.Module:
    return hp.nn.replace_multihead_attention(Classifier(**options)).eval()


def batches(count=3):
    torch.manual_seed(1)
    return [{"x": torch.randn(4, 5, 16), "labels": torch.randint(0, 3, (4,))} for _ in range(count)]


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


KEEP = {"encoder.layers.0.self_attn": [1, 2], "encoder.layers.1.self_attn": [0, 2, 3]}


@pytest.mark.parametrize("batch_first", [True, False])
def test_cutting_equals_gating(batch_first):
    whole, x = model(batch_first=batch_first), batches()[0]["x"]
    with hp.gated(whole, KEEP):
        expected = whole(x)
    hp.cut(whole, KEEP)
    assert torch.allclose(whole(x), expected, atol=1e-6)
    assert [site.head_map.query_heads for site in hp.attention_sites(whole)] == [2, 3]


@pytest.mark.parametrize("batch_first", [True, False])
def test_scores_of_every_sample_reach_every_head(batch_first):
    whole = model(batch_first=batch_first)
    scores = hp.score(whole, batches(), criterion="fisher", loss_fn=loss)
    assert {name: tuple(scores[name].shape) for name in scores} == dict.fromkeys(KEEP, (4,))
    attention = whole.encoder.layers[1].self_attn
    attention.gate = nn.Parameter(torch.ones(4))
    expected = torch.zeros(4)
    for batch in batches():
        for sample in loss(whole, batch):
            expected += torch.autograd.grad(sample, attention.gate, retain_graph=True)[0].square()
    assert torch.allclose(scores["encoder.layers.1.self_attn"], expected / 12, rtol=1e-4)


def test_a_plan_is_carried_out_with_compensation():
    whole = model()
    plan = hp.plan(hp.score(whole, [], criterion="magnitude_l2"), hp.Budget(heads=0.5))
    pruned = copy.deepcopy(whole)
    forward = lambda model, batch: model(batch["x"])  # noqa: E731
    reports = hp.prune(pruned, plan, calibration=batches(6), forward=forward, token_mask=lambda batch: None)
    assert all(report.error_after < report.error_before for report in reports)
    assert sum(site.head_map.query_heads for site in hp.attention_sites(pruned)) == 4
    assert pruned(batches()[0]["x"]).shape == (4, 3)


def test_ragged_groups_need_no_attention_interface():
    layer = nn.Sequential(hp.nn.VariableHeadAttention(16, 4, num_kv_heads=2))
    hp.cut(layer, {"0": [0, 1, 2]})
    assert layer[0].head_map == hp.HeadMap((0, 0, 1), 2)


def test_the_learned_key_and_the_gate_are_cut_too():
    layer = nn.Sequential(hp.nn.VariableHeadAttention(16, 4, add_bias_kv=True, gate=True))
    layer[0].gate.data = torch.arange(4.0)
    hp.cut(layer, {"0": [1, 3]})
    assert layer[0].gate.tolist() == [1.0, 3.0]
    assert layer[0].bias_k.shape == (1, 1, 8)


def test_the_weights_of_a_pruned_model_load_into_a_whole_one(tmp_path):
    pruned, x = model(), batches()[0]["x"]
    hp.cut(pruned, KEEP)
    torch.save(pruned.state_dict(), tmp_path / "weights.pt")
    again = model()
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(again(x), pruned(x))


def test_torchs_own_attention_is_refused_with_the_way_out():
    with pytest.raises(UnsupportedModel, match=r"self_attn \(MultiheadAttention\).*replace_multihead_attention"):
        hp.attention_sites(Classifier())
