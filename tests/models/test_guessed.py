"""Attention of the user's own, which no adapter knows: cut where a forward pass proves it, otherwise refused by name."""

import copy

import pytest
import torch
from torch import nn

import headprune as hp
from headprune.errors import UnsupportedModel

HEADS, WIDTH = 4, 16


class OwnAttention(nn.Module):
    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.size = HEADS, kv_heads, WIDTH // HEADS
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wk, self.wv = (nn.Linear(WIDTH, kv_heads * self.size) for _ in range(2))

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.wq, self.wk, self.wv))
        weights = self.mixed((q @ k.transpose(2, 3)).softmax(-1))
        return self.wo((weights @ v).transpose(1, 2).flatten(2))

    def split(self, x):
        x = x.unflatten(2, (-1, self.size)).transpose(1, 2)
        return x.repeat_interleave(self.n_heads // x.shape[1], 1)

    def mixed(self, weights):
        return weights


class TalkingAttention(OwnAttention):
    """Each head's weights depend on those of the others."""

    def mixed(self, weights):
        return weights + weights.mean(1, keepdim=True)


class FixedAttention(OwnAttention):
    """Its forward knows the number of heads by heart."""

    def split(self, x):
        return x.unflatten(2, (HEADS, self.size)).transpose(1, 2)


class GatedAttention(OwnAttention):
    """A parameter that may belong to heads or not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEADS))


def model(attention=OwnAttention, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), attention(**options), attention(**options))


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kv_heads", "keep"), [(HEADS, {"1": [0, 3], "2": [2]}), (2, {"1": [0, 1], "2": [1, 3]})])
def test_an_unknown_attention_is_cut_where_a_forward_pass_proves_it(kv_heads, keep):
    whole = model(kv_heads=kv_heads)
    pruned = copy.deepcopy(whole)
    hp.cut(pruned, keep, run=lambda model: model(X))
    with hp.gated(whole, keep):
        assert torch.allclose(pruned(X), whole(X), atol=1e-6)
    assert [str(site.head_map) for site in hp.attention_sites(pruned)] == (
        ["2q/2kv", "1q/1kv"] if kv_heads == HEADS else ["2q/1kv", "2q/2kv"]
    )
    hp.cut(pruned, {"1": [1]}, run=lambda model: model(X))
    with hp.gated(whole, {**keep, "1": keep["1"][1:]}):
        assert torch.allclose(pruned(X), whole(X), atol=1e-6)


def test_calibration_batches_prove_it_too():
    whole, plan = model(), {"1": [0, 3], "2": [2]}
    hp.prune(whole, hp.PruningPlan.from_keep(whole, plan), [X] * 6, forward=lambda m, x: m(x), token_mask=lambda batch: None)
    assert [site.head_map.query_heads for site in hp.attention_sites(whole)] == [2, 1]


@pytest.mark.parametrize(
    ("attention", "keep", "run", "names"),
    [
        (OwnAttention, {"1": [0]}, None, r"1 \(OwnAttention\) is not a known attention, and no forward pass"),
        (TalkingAttention, {"1": [0]}, lambda model: model(X), r"1 \(TalkingAttention\) gives something else"),
        (FixedAttention, {"1": [0]}, lambda model: model(X), r"1 \(FixedAttention\) cannot be cut: without those heads"),
        (OwnAttention, {"1": []}, lambda model: model(X), "it would return 2 values, not Tensor"),
        (GatedAttention, {"1": [0]}, lambda model: model(X), r"no adapter knows 1 \(GatedAttention\)"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_not_proved_is_refused_by_name_and_left_alone(attention, keep, run, names, verify):
    whole = model(attention)
    with pytest.raises(UnsupportedModel, match=names):
        hp.cut(whole, keep, run=run, verify=verify)
    assert whole[1].wq.weight.shape == (WIDTH, WIDTH)
