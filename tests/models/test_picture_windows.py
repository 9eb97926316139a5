"""SAM and ViTDet, whose attentions take pictures [batch, rows, columns, features] or windows of them; they give no loss."""

import json

import pytest
import torch
from tiny_segmenters import SEGMENTERS, pictures
from torch import Tensor

import headprune as hp

RUNS = [(name, implementation) for name, family in SEGMENTERS.items() for implementation in family.implementations]


def output(model, batch) -> Tensor:
    found = model(**batch)
    return next(found[name] for name in ("pred_masks", "last_hidden_state") if name in found)


def plans(sites) -> list[dict[str, list[int]]]:
    heads = {site.name: site.head_map.query_heads for site in sites}
    every_second = {name: [] if index % 2 else [1] for index, name in enumerate(heads)}
    return [{name: list(range(1, many)) for name, many in heads.items()}, every_second]


@pytest.mark.parametrize(("name", "implementation"), RUNS)
def test_cutting_equals_gating(name, implementation):
    family = SEGMENTERS[name]
    batch = family.batch("left")
    for plan in range(2):
        model = family.make(implementation)
        keep = plans(hp.attention_sites(model))[plan]
        with torch.no_grad():
            dense = output(model, batch)
            with hp.gated(model, keep):
                expected = output(model, batch)
            hp.cut(model, keep, run=lambda model: model(**batch))
            assert torch.allclose(output(model, batch), expected, atol=1e-5)
        assert (dense - expected).abs().max() > 1e-3, "the plan removed nothing that matters"


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_pruned_model_survives_the_disk(name, tmp_path):
    model, batch = SEGMENTERS[name].make(), SEGMENTERS[name].batch("left")
    hp.cut(model, plans(hp.attention_sites(model))[1], run=lambda model: model(**batch))
    hp.save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["headprune"]["layout"], "needs headprune to load"
    again = hp.load(tmp_path / "model", attn_implementation="eager")
    assert torch.equal(output(again, batch), output(model, batch))


def loss_of_each(model, batch) -> Tensor:
    return output(model, batch).flatten(1).square().mean(dim=1)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_together_pictures_measure_as_one_by_one(name):
    model, batch = SEGMENTERS[name].make(), SEGMENTERS[name].batch("left")
    needs = {"gate_gradient", "gram", "output_norm"}
    together = hp.observe(model, [batch], needs, loss_fn=loss_of_each)
    alone = hp.observe(model, [SEGMENTERS[name].one(batch, row) for row in range(3)], needs, loss_fn=loss_of_each)
    for site in together:
        for field in ("gate_gradient", "input_gram", "projected_norm"):
            found, expected = getattr(together[site], field), getattr(alone[site], field)
            if field == "projected_norm":  # of windows, or prompts, in any order
                found, expected = found.sort(dim=0).values, expected.sort(dim=0).values
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), (site, field)
        assert together[site].gate_gradient.shape[0] == 3


def test_pictures_with_prompts_are_measured_by_losses_as_one_by_one():
    """SegGPT runs them as other rows of a batch."""
    model, batch = SEGMENTERS["seggpt"].make(), SEGMENTERS["seggpt"].batch("left")
    together = hp.score(model, [batch], criterion="ablation", loss_fn=loss_of_each)
    rows = [SEGMENTERS["seggpt"].one(batch, row) for row in range(3)]
    alone = hp.score(model, rows, criterion="ablation", loss_fn=loss_of_each)
    for site in hp.attention_sites(model):
        assert torch.allclose(together[site.name], alone[site.name], rtol=1e-3, atol=1e-5)


def test_several_prompts_for_one_picture_and_the_loss_are_those_of_the_gated_model():
    model = SEGMENTERS["seggpt"].make()
    batch = {**SEGMENTERS["seggpt"].batch("right"), "labels": pictures("left", 8)}
    keep = plans(hp.attention_sites(model))[1]
    found = []
    for ensemble in (False, True):
        with torch.no_grad(), hp.gated(model, keep):
            found.append((ensemble, model(**batch, feature_ensemble=ensemble)))
    hp.cut(model, keep)
    for ensemble, expected in found:
        with torch.no_grad():
            given = model(**batch, feature_ensemble=ensemble)
        assert torch.allclose(given.loss, expected.loss, atol=1e-6)
        assert torch.allclose(given.pred_masks, expected.pred_masks, atol=1e-5)
