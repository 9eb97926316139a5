"""I-BERT: heads are cut before its layers round to integers, and it rounds after that."""

import json

import pytest
import torch
import transformers
from tiny_encoders import ENCODERS

import headprune as hp

FAMILY = ENCODERS["ibert"]


def logits(model) -> torch.Tensor:
    batch = {name: value for name, value in FAMILY.batch("right").items() if name != "labels"}
    with torch.no_grad():
        return model(**batch).logits * batch["attention_mask"][..., None]


def plan_for(model, heads) -> dict[str, list[int]]:
    return dict(zip((site.name for site in hp.attention_sites(model)), heads, strict=True))


def rounding(folder):
    """The model of `folder` in integers, its ranges taken from a few passes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quant_mode": True}))
    model = hp.load(folder, verify=False)
    model.train()
    for _ in range(8):
        logits(model)
    return model.eval()


def test_room_for_integers_goes_with_its_heads():
    model = FAMILY.make()
    site = hp.attention_sites(model)[0]
    before = sum(parameter.numel() for parameter in model.parameters())
    per_head = site.parameters_per_head(False) + site.parameters_per_head(True)
    hp.cut(model, {site.name: [0, 2, 3]})
    attention = site.module
    for layer in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
        assert layer.weight_integer.shape == layer.weight.shape
        assert (layer.out_features, layer.in_features) == layer.weight.shape
        assert layer.bias_integer.shape == layer.fc_scaling_factor.shape == layer.bias.shape
    assert before - sum(parameter.numel() for parameter in model.parameters()) == per_head


@pytest.mark.parametrize("heads", [[[0, 3], [2]], [[], [1, 2]], [[1], []]])
def test_a_pruned_model_computes_in_integers(heads, tmp_path):
    model = FAMILY.make()
    hp.cut(model, plan_for(model, heads))
    hp.save(model, tmp_path)
    expected, integers = logits(model), rounding(tmp_path)
    assert integers.config.quant_mode
    assert [site.head_map.query_heads for site in hp.attention_sites(integers)] == [len(kept) for kept in heads]
    dense = FAMILY.make()
    dense.save_pretrained(tmp_path / "dense")
    usual = (logits(rounding(tmp_path / "dense")) - logits(dense)).abs().mean()
    assert (logits(integers) - expected).abs().mean() < 2 * usual


def test_where_it_rounds_already_a_line_says_what_to_do(tmp_path):
    FAMILY.make().save_pretrained(tmp_path)
    model = rounding(tmp_path)
    before = logits(model)
    with pytest.raises(hp.UnsupportedModel, match=r"cannot lose heads exactly: .* Prune with quant_mode=False and round after\."):
        hp.cut(model, plan_for(model, [[0], [1]]))
    assert torch.equal(logits(model), before)
    hp.cut(model, plan_for(model, [[0], [1]]), verify=False)
    assert torch.isfinite(logits(model)).all()


def test_the_class_is_the_stock_one_where_no_heads_are_gone():
    kind = transformers.models.ibert.modeling_ibert.IBertSelfAttention
    model = FAMILY.make()
    hp.cut(model, plan_for(model, [[0], [0, 1, 2, 3]]))
    assert [type(site.module.self) for site in hp.attention_sites(model)] == [kind, kind]


def test_it_is_scored_and_pruned_in_its_files(tmp_path):
    model = FAMILY.make()
    model.save_pretrained(tmp_path / "dense")
    batch = FAMILY.batch("left")
    streamed = hp.score(hp.open_streamed(tmp_path / "dense"), [batch], criterion="fisher")
    for name, found in hp.score(model, [batch], criterion="fisher").items():
        assert torch.allclose(streamed[name], found, rtol=1e-4)
    keep = plan_for(model, [[0, 3], [1]])
    hp.prune_folder(tmp_path / "dense", hp.PruningPlan.from_keep(model, keep), tmp_path / "pruned")
    hp.cut(model, keep)
    assert torch.allclose(logits(hp.load(tmp_path / "pruned")), logits(model), atol=1e-6)
