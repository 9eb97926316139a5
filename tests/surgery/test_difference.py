"""What `print(model)` and `hp.diff` say of what was removed."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from tiny_decoders import decoder
from tiny_encoders import SEQ2SEQ
from tiny_models import bert, llama
from torch import nn

import headprune as hp
from headprune.surgery.export import export

KEEP = {"model.layers.0.self_attn": [0, 1, 3], "model.layers.1.self_attn": [6, 7]}


def pruned():
    model = llama()
    hp.cut(model, KEEP)
    return model


def test_a_pruned_model_prints_its_head_maps_also_from_copies_and_from_the_disk(tmp_path):
    model = pruned()
    hp.save(model, tmp_path / "model")
    for found in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), hp.load(tmp_path / "model")):
        assert "(self_attn): LlamaAttention(\n          heads=3/8 kv=2/4 groups=2+1\n" in str(found)
        assert "heads=2/8 kv=1/4\n" in str(found)
    hp.cut(model, {"model.layers.0.self_attn": [2], "model.layers.1.self_attn": []})
    assert "heads=1/8 kv=1/4\n" in str(model)
    assert "heads=0/8 kv=0/4\n" in str(model)
    assert "heads=" not in str(llama())


def test_the_part_that_computes_the_attention_prints_it():
    model = bert()
    hp.cut(model, {"encoder.layer.1.attention": [2]})
    assert str(model).count("(self): BertSelfAttention(\n            heads=4/4\n") == 1
    assert str(model).count("(self): BertSelfAttention(\n            heads=1/4\n") == 1


def test_models_and_folders_tell_the_same(tmp_path):
    dense, small = llama().to(torch.bfloat16), pruned().to(torch.bfloat16)
    hp.save(dense, tmp_path / "dense")
    hp.save(small, tmp_path / "small")
    told = hp.diff(dense, small)
    assert told.removed == {"model.layers.0.self_attn": (2, 4, 5, 6, 7), "model.layers.1.self_attn": (0, 1, 2, 3, 4, 5)}
    assert told.savings.cache_bytes == (2 * 4 * 16 * 2, 3 * 16 * 2)
    assert told.savings.projection_flops == (2 * 2 * 32 * 192, 2 * 32 * (80 + 48))
    assert told.savings.parameters == (dense.num_parameters(), small.num_parameters())
    for before, after in ((dense, tmp_path / "small"), (tmp_path / "dense", small), (tmp_path / "dense", str(tmp_path / "small"))):
        assert hp.diff(before, after) == told
    assert hp.diff(small, tmp_path / "small").removed == {}
    assert "model.layers.0.self_attn: 8q/4kv -> 3q/2kv ragged 2+1; gone: 2, 4-7" in str(told)
    assert "the same heads in every attention" in str(hp.diff(dense, dense))


def test_a_second_pruning_is_told_by_the_numbers_of_the_original():
    first, second = pruned(), pruned()
    hp.cut(second, {"model.layers.0.self_attn": [0, 2]})
    assert hp.diff(first, second).removed == {"model.layers.0.self_attn": (1,)}


def test_another_model_of_the_same_names_is_refused():
    """Their counts may be the same, and the difference of their sizes is nothing that was removed."""
    with pytest.raises(hp.InvalidInput, match=r"the first is of type llama, the second mistral"):
        hp.diff(llama(), decoder("mistral"))
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**llama().config.to_dict(), "hidden_size": 48}))
    with pytest.raises(
        hp.InvalidInput, match=r"at model\.layers\.0\.self_attn the first has head_dim 8, hidden size 32, the second"
    ):
        hp.diff(llama(), wide)


def test_an_export_is_told_by_its_counts(tmp_path):
    """It is the same model, and does not say which heads of the original it has."""
    small, stock = pruned(), tmp_path / "stock"
    export(small, "stock", stock)
    for before, after in ((small, stock), (stock, small), (llama(), stock), (small, transformers.AutoModel.from_pretrained(stock))):
        assert set(hp.diff(before, after).removed.values()) == {None}
    again = hp.load(stock)
    hp.cut(again, {"model.layers.0.self_attn": [0, 1]})
    assert hp.diff(stock, again).removed == {"model.layers.0.self_attn": (2, 3)}


def test_an_edited_head_section_is_not_told_of(tmp_path):
    """As `load` refuses it."""
    folder = hp.save(pruned(), tmp_path / "pruned")
    config = json.loads((folder / "config.json").read_text())
    config["headprune"]["sites"]["model.layers.1.self_attn"]["kept"] = [0, 1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        hp.CorruptCheckpoint, match=r"its sections headprune .* are not those that were saved.* remove headprune\.json"
    ):
        hp.diff(llama(), folder)
    (folder / "headprune.json").unlink()
    assert hp.diff(llama(), folder).removed["model.layers.1.self_attn"] == (2, 3, 4, 5, 6, 7)


def test_a_base_model_pairs_with_one_under_a_head():
    small = pruned()
    assert hp.diff(llama().model, small).removed == {
        name.removeprefix("model."): heads for name, heads in hp.diff(llama(), small).removed.items()
    }
    assert list(hp.diff(llama(), small.model).removed) == list(KEEP)


def test_other_models_are_told_too():
    whole, small = SEQ2SEQ["t5"].make(), SEQ2SEQ["t5"].make()
    hp.cut(small, {"decoder.block.1.layer.1.EncDecAttention": [0, 3]})
    assert hp.diff(whole, small).removed == {"decoder.block.1.layer.1.EncDecAttention": (1, 2)}
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    cut = copy.deepcopy(layer)
    hp.cut(cut, {"self_attn": [1, 2]})
    assert hp.diff(layer, cut).removed == {"self_attn": (0, 3)}
    assert type(layer.self_attn) is nn.MultiheadAttention


def test_what_was_not_made_from_the_first_is_refused():
    with pytest.raises(hp.InvalidInput, match=r"was not made from the first: at model\.layers\.0\.self_attn"):
        hp.diff(pruned(), llama())
    with pytest.raises(hp.InvalidInput, match="do not have the same attentions: only one of them has"):
        hp.diff(bert(), llama())
