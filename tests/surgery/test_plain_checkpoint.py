"""Modules that are not of transformers: saved as weights and head maps, loaded into the unpruned module."""

import pytest
import torch
from tiny_models import llama
from torch import nn

from headprune.errors import CorruptCheckpoint, InvalidInput, InvalidPlan
from headprune.models import attention_sites
from headprune.nn import VariableHeadAttention, replace_multihead_attention
from headprune.surgery import cut, load, save


def torch_encoder(seed: int = 0, width: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(width, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def encoder(seed: int = 0, width: int = 32) -> nn.Module:
    return replace_multihead_attention(torch_encoder(seed, width))


@pytest.fixture
def pruned():
    model = encoder()
    cut(model, {"layers.0.self_attn": [1, 3]})
    cut(model, {"layers.0.self_attn": [1], "layers.1.self_attn": [0, 2, 3]})
    return model


@pytest.mark.parametrize("make", [encoder, torch_encoder])
def test_an_encoder_of_torch_comes_back_with_its_heads_and_weights(tmp_path, pruned, make):
    folder = save(pruned, tmp_path / "encoder")
    again = load(folder, model=make(seed=1))
    x = torch.randn(2, 5, 32)
    assert torch.equal(again(x), pruned(x))
    assert [site.head_map.query_heads for site in attention_sites(again)] == [1, 3]
    folder = save(again, tmp_path / "again")
    assert torch.equal(load(folder, model=encoder(seed=2))(x), pruned(x))


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = VariableHeadAttention(16, 4, batch_first=True)
            self.embedding, self.head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    cut(model, {"attention": [2]})
    again = load(save(model, tmp_path / "tied"), model=Tied())
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again.head.weight, model.head.weight)


def test_what_does_not_belong_together_is_refused(tmp_path, pruned):
    folder = save(pruned, tmp_path / "encoder")
    with pytest.raises(InvalidPlan, match=r"layers\.0\.self_attn"):
        load(folder, model=llama())
    with pytest.raises(InvalidPlan, match="unpruned TransformerEncoder"):
        load(folder, model=pruned)
    deeper = nn.Sequential(torch_encoder())
    with pytest.raises(InvalidPlan, match=r"layers\.0\.self_attn"):
        load(folder, model=deeper)
    assert type(deeper[0].layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(CorruptCheckpoint, match="does not fit"):
        load(folder, model=encoder(width=64))
    with pytest.raises(InvalidInput, match="without model="):
        load(save(llama(), tmp_path / "llama"), model=encoder())
    with pytest.raises(InvalidInput, match=r"no headprune\.json"):
        load(tmp_path, model=encoder())
    with pytest.raises(InvalidInput, match=r"holds a TransformerEncoder, which is not of transformers: hp.load\(folder, model="):
        load(folder)
    with pytest.raises(InvalidInput, match="max_shard_size"):
        save(pruned, tmp_path / "sharded", max_shard_size="1GB")
    assert not (tmp_path / "sharded").exists()


@pytest.mark.parametrize("change", [lambda model: cut(model, {"layers.0.self_attn": [1, 3]}), replace_multihead_attention])
def test_a_module_that_does_not_fit_stays_as_it_is(tmp_path, change):
    model = torch_encoder()
    change(model)
    other = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CorruptCheckpoint, match=r"(?s)does not fit the given TransformerEncoder: .*linear1\.weight"):
        load(save(model, tmp_path / "model"), model=other)
    assert type(other.layers[0].self_attn) is nn.MultiheadAttention
    assert other.training
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_corrupt_file_is_named(tmp_path, pruned):
    folder = save(pruned, tmp_path / "encoder")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is corrupt"):
        load(folder, model=encoder())


class OwnAttention(nn.Module):
    """Known by its structure alone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def by_part(model):
    cut(model[0], {"layers.0.self_attn": [1, 3]})


def by_hand(model):
    replace_multihead_attention(model)[0].layers[0].self_attn.prune([1, 3])


def by_part_and_whole(model):
    by_part(model)
    cut(model, {"0.layers.0.self_attn": [0], "0.layers.1.self_attn": [2, 3]})


@pytest.mark.parametrize("change", [replace_multihead_attention, by_part, by_hand, by_part_and_whole])
def test_torchs_attentions_come_back_however_they_were_swapped_and_cut(tmp_path, change):
    model, x = nn.Sequential(torch_encoder(), nn.Linear(32, 3)).eval(), torch.randn(2, 5, 32)
    change(model)
    again = load(save(model, tmp_path / "model"), model=nn.Sequential(torch_encoder(seed=1), nn.Linear(32, 3)))
    assert torch.equal(again(x), model(x))


def test_a_part_that_was_cut_by_itself_is_saved_with_the_whole(tmp_path):
    fresh = lambda: nn.Sequential(nn.Sequential(OwnAttention()), OwnAttention())  # noqa: E731
    model, x = fresh(), torch.randn(2, 5, 32)
    cut(model[0], {"0": [1, 3]}, run=lambda model: model(x))
    cut(model[1], {"": [0, 2]}, run=lambda model: model(x))
    assert torch.equal(load(save(model, tmp_path / "parts"), model=fresh())(x), model(x))
    cut(model, {"0.0": [1], "1": [0]}, run=lambda model: model(x))
    assert torch.equal(load(save(model, tmp_path / "whole"), model=fresh())(x), model(x))


def test_an_attention_that_only_its_structure_tells_comes_back_too(tmp_path):
    model, x = nn.Sequential(OwnAttention()), torch.randn(2, 5, 32)
    cut(model, {"0": [1, 3]}, run=lambda model: model(x))
    again = load(save(model, tmp_path / "own"), model=nn.Sequential(OwnAttention()))
    assert torch.equal(again(x), model(x))
