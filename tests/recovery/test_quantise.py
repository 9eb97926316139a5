"""Weights are rounded after pruning; the formula is torch's, the models beside them stay as they are."""

import copy

import pytest
import torch
from pruned_pairs import pruned_bert, pruned_llama, text_batches
from small_states import SmallStates
from tiny_models import hidden, llama, tokens
from torch import nn

import headprune as hp
from headprune.errors import InvalidInput, UnsupportedModel
from headprune.recovery.quantise import in_seven_bits
from headprune.surgery.export import export

pytest.importorskip("torchao")


def test_int8_weights_are_each_row_over_its_largest():
    _, model = pruned_bert()
    before = copy.deepcopy(model)
    report = hp.recovery.quantise(model, "int8")
    assert "encoder.layer.1.output.dense" in report.layers
    assert report.left == {}
    weight = before.encoder.layer[0].attention.self.query.weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    rounded = model.encoder.layer[0].attention.self.query.weight.dequantize()
    assert (rounded - weight).abs().max() <= 1.01 * scale.max()
    assert not torch.equal(rounded, weight)
    difference = hidden(model, input_ids=tokens()) - hidden(before, input_ids=tokens())
    assert 0 < float(difference.norm() / hidden(before, input_ids=tokens()).norm()) < 0.05


def test_int4_leaves_layers_whose_inputs_do_not_divide():
    _, model = pruned_bert()
    report = hp.recovery.quantise(model, "int4", group=16)
    assert report.left == {
        "encoder.layer.0.attention.output.dense": "its 24 inputs are no multiple of 16",
        "encoder.layer.1.attention.output.dense": "its 8 inputs are no multiple of 16",
    }
    weight = model.encoder.layer[0].intermediate.dense.weight.dequantize()
    groups = weight.unflatten(1, (-1, 16))
    assert max(len(row.unique()) for row in groups.flatten(0, 1)) <= 16


def test_w8a8_rounds_the_inputs_of_each_token_too():
    """Against the formula: whole numbers of a row's scale, its largest over 127.5, multiplied; 7 bits on a CPU without VNNI."""
    layer = nn.Sequential(nn.Linear(64, 40))
    weight, bias, x = layer[0].weight.detach(), layer[0].bias.detach(), torch.randn(2, 3, 64)

    largest = 64 if in_seven_bits(layer) else 128

    def rounded(rows):
        scale = rows.abs().amax(dim=-1, keepdim=True) / (largest - 0.5)
        return (rows * (1 / scale)).round().clamp(-largest, largest - 1) * scale

    assert str(hp.recovery.quantise(layer, "w8a8")) == "weights and activations in int8 in 1 linear layers"
    expected = rounded(x) @ rounded(weight).t() + bias
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-5, atol=1e-5)
    assert float((x @ weight.t() + bias - expected).abs().max()) > 1e-3


def test_a_pruned_model_computes_in_w8a8():
    for dense, inputs in ((pruned_bert, {"input_ids": tokens()}), (pruned_llama, {"input_ids": tokens()})):
        _, model = dense()
        before = hidden(model, **inputs)
        hp.recovery.quantise(model, "w8a8")
        assert 0 < float((hidden(model, **inputs) - before).norm() / before.norm()) < 0.1


def test_the_output_head_stays():
    _, model = pruned_llama(tie_word_embeddings=True)
    assert not any("lm_head" in name or "embed" in name for name in hp.recovery.quantise(model).layers)
    assert torch.isfinite(model(**text_batches(1)[0]).loss)


def test_pruned_and_quantised_are_measured_together():
    dense, pruned = pruned_bert()
    rows = hp.recovery.compare_quantised({"dense": dense, "pruned": pruned}, SmallStates(), ("int8",), repeats=2)
    assert [(row.model, row.form) for row in rows] == [
        ("dense", "as it is"), ("dense", "int8"), ("pruned", "as it is"), ("pruned", "int8"),
    ]  # fmt: skip
    assert rows[3].bytes < rows[1].bytes < rows[0].bytes
    assert rows[2].quality["norm"] == SmallStates().evaluate(pruned)["norm"]
    assert type(pruned.encoder.layer[0].intermediate.dense.weight) is torch.nn.Parameter


def test_a_quantised_model_is_not_saved(tmp_path):
    _, model = pruned_bert()
    hp.recovery.quantise(model)
    with pytest.raises(UnsupportedModel, match="Save the model before quantising"):
        hp.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("to", ["stock", "vllm", "nemotron-nas"])
def test_a_quantised_model_is_not_exported(to, tmp_path):
    model = llama()
    hp.recovery.quantise(model)
    with pytest.raises(UnsupportedModel, match=r"q_proj holds quantised weights, which this export .* before quantising it"):
        export(model, to, tmp_path / "out")


def test_an_unknown_form_is_named():
    with pytest.raises(InvalidInput, match="unknown form of weights 'int2'"):
        hp.recovery.quantise(pruned_bert()[1], "int2")
