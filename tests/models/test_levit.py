"""LeViT: batch norms behind its projections, biases of positions that it keeps ready, and attentions that make pictures smaller."""

import copy

import pytest
import torch
import transformers
from tiny_encoders import VISION, trained

import headprune as hp
from headprune.surgery.export.stock import stock_model

FAMILY = VISION["levit"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=FAMILY.batch("left")["pixel_values"]).logits


def plan_for(model, heads) -> dict[str, list[int]]:
    return {site.name: heads[index % len(heads)] for index, site in enumerate(hp.attention_sites(model))}


def test_batch_norms_lose_the_features_of_their_heads_and_only_parameters_count():
    model = FAMILY.make()
    site = hp.attention_sites(model)[0]
    before = sum(parameter.numel() for parameter in model.parameters())
    norm = copy.deepcopy(site.module.queries_keys_values.batch_norm)
    hp.cut(model, {site.name: [0, 2, 3]})
    cut = site.module.queries_keys_values.batch_norm
    width = 2 * site.head_dim + site.value_dim
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(cut, name), getattr(norm, name).unflatten(0, (4, width))[[0, 2, 3]].flatten())
    assert cut.num_features == 3 * width
    per_head = site.parameters_per_head(False) + site.parameters_per_head(True)
    assert before - sum(parameter.numel() for parameter in model.parameters()) == per_head


def test_biases_that_were_kept_ready_are_made_anew():
    model = FAMILY.make()
    keep = plan_for(model, [[1], [0, 2]])
    logits(model)
    with hp.gated(model, keep):
        expected = logits(model)
    ready = {site.name: dict(site.module.attention_bias_cache) for site in hp.attention_sites(model)}
    assert all(ready.values())
    hp.cut(model, keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("heads", [[[1, 3]], [[], [2]], [[0], []]])
def test_training_goes_on_and_the_training_mode_is_the_gated_models(heads):
    dense = FAMILY.make()
    pruned, keep = copy.deepcopy(dense), plan_for(dense, heads)
    hp.cut(pruned, keep)
    dense.train(), pruned.train()
    with hp.gated(dense, keep):
        expected = logits(dense)
    assert torch.allclose(logits(pruned), expected, atol=1e-4)  # its norms take their statistics from the batch
    pruned(**FAMILY.batch("left")).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pruned.parameters() if parameter.grad is not None)


def test_both_heads_of_the_distilled_model():
    torch.manual_seed(0)
    model = trained(transformers.LevitForImageClassificationWithTeacher(FAMILY.make().config)).eval()
    pixels = FAMILY.batch("left")["pixel_values"]
    keep = plan_for(model, [[0, 3], [2]])
    with torch.no_grad(), hp.gated(model, keep):
        expected = model(pixel_values=pixels)
    hp.cut(model, keep)
    with torch.no_grad():
        found = model(pixel_values=pixels)
    for name in ("cls_logits", "distillation_logits"):
        assert torch.allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.parametrize("criterion", ["magnitude_l2", "wanda", "taylor_weight"])
def test_criteria(criterion):
    model = FAMILY.make()
    scores = hp.score(model, [FAMILY.batch("left")], criterion=criterion)
    assert all(torch.isfinite(scores[site.name]).all() and scores[site.name].any() for site in hp.attention_sites(model))


def test_pruning_with_compensation_and_the_way_back_to_the_unmodified_class():
    model = FAMILY.make()
    pictures = {"pixel_values": torch.randn(160, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    hp.prune(model, hp.PruningPlan.from_keep(model, plan_for(model, [[0, 1, 3], [2], [1, 2]])), calibration=[pictures])
    dense, _ = stock_model(model)
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)


def test_batch_norms_are_cut_in_the_files_too(tmp_path):
    model = FAMILY.make()
    model.save_pretrained(tmp_path / "dense")
    keep = plan_for(model, [[0, 1, 3], [2], []])
    hp.prune_folder(tmp_path / "dense", hp.PruningPlan.from_keep(model, keep), tmp_path / "pruned")
    hp.cut(model, keep)
    assert torch.allclose(logits(hp.load(tmp_path / "pruned")), logits(model), atol=1e-6)
