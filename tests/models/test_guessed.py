"""Attention of the user's own, which no adapter knows: cut where a forward pass proves it, otherwise refused by name."""

import copy

import pytest
import torch
import transformers
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


class FusedAttention(nn.Module):
    """All queries, all keys, all values in one layer; a container behind them; the head count under another name."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = HEADS, kv_heads, WIDTH // HEADS
        self.to_qkv = nn.Linear(WIDTH, (HEADS + 2 * kv_heads) * self.size, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x) -> torch.Tensor:
        q, k, v = self.to_qkv(x).split([count * self.size for count in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k, v = (part.unflatten(2, (-1, self.size)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        return self.to_out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class InterleavedAttention(FusedAttention):
    """Query, key and value of each head stand together."""

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(2, (self.heads, 3, self.size)).permute(3, 0, 2, 1, 4)
        return self.to_out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class WidthAttention(FusedAttention):
    """Its forward takes the size of a head from the width of what it receives."""

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, x.shape[2] // self.heads)).permute(2, 0, 3, 1, 4)
        return self.to_out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


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


@pytest.mark.parametrize(("kv_heads", "keep"), [(HEADS, {"1": [0, 3], "2": []}), (2, {"1": [0, 1], "2": [1, 3]})])
def test_so_is_one_whose_projections_are_fused(kv_heads, keep, tmp_path):
    whole = model(FusedAttention, kv_heads=kv_heads).eval()
    pruned = copy.deepcopy(whole)
    hp.cut(pruned, keep, run=lambda model: model(X))
    with hp.gated(whole, keep):
        assert torch.allclose(pruned(X), whole(X), atol=1e-6)
    again = hp.load(hp.save(pruned, tmp_path / "fused"), model=model(FusedAttention, kv_heads=kv_heads))
    assert torch.equal(again(X), pruned(X))
    assert pruned[1].heads == len(keep["1"])


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
        (InterleavedAttention, {"1": [0]}, lambda model: model(X), r"1 \(InterleavedAttention\) gives something else"),
        (WidthAttention, {"1": [0]}, lambda model: model(X), r"without those heads it fails .* must take the size of a head from"),
        (GatedAttention, {"1": [0]}, lambda model: model(X), r"no adapter knows 1 \(GatedAttention\)"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_not_proved_is_refused_by_name_and_left_alone(attention, keep, run, names, verify):
    whole = model(attention)
    shapes = [parameter.shape for parameter in whole.parameters()]
    with pytest.raises(UnsupportedModel, match=names):
        hp.cut(whole, keep, run=run, verify=verify)
    assert [parameter.shape for parameter in whole.parameters()] == shapes


JOINED = {
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "init_std": 0.2, "dropout": 0.0},
    "Mvp": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.2, "dropout": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_a_forward_that_joins_the_heads_to_embed_dim_features_is_told_how_many_are_left(name, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=61, max_position_embeddings=32, **JOINED[name])
    model = getattr(transformers, f"{name}Model")(config).eval()
    keep = {site.name: [] if index == 1 else [index % 4, 3] for index, site in enumerate(hp.attention_sites(model))}
    keep = {name: sorted(set(heads)) for name, heads in keep.items()}
    ids = torch.randint(3, 61, (2, 7))
    with torch.no_grad(), hp.gated(model, keep):
        expected = model(ids).last_hidden_state
    hp.cut(model, keep)
    again = hp.load(hp.save(model, tmp_path / "model"))
    with torch.no_grad():
        assert all(torch.allclose(one(ids).last_hidden_state, expected, atol=1e-5) for one in (model, again))
