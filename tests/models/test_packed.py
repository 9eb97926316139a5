"""Pictures of all samples in one sequence: whose token is whose, in measurements and in compensation."""

import pytest
import torch
from tiny_vision_language import MARKS, PICTURE_TOKEN, VIDEO_TOKEN, VISION_LANGUAGE
from torch import nn

import headprune as hp
from headprune.errors import InvalidInput
from headprune.models.packed import allotted, sample_lengths
from headprune.models.tokens import token_masks


class Configured(nn.Module):
    def __init__(self, **config) -> None:
        super().__init__()
        self.config = type("Config", (), config)()


IDS = torch.tensor([[PICTURE_TOKEN] * 5, [1, 2, 3, 4, 5], [1, PICTURE_TOKEN, 2, PICTURE_TOKEN, PICTURE_TOKEN]])
GRIDS = torch.tensor([[1, 2, 2], [1, 4, 4], [1, 2, 6]])  # 4 + 16 + 12 patches, 8 places of four


def test_placeholders_tell_also_where_samples_have_several_pictures_or_none():
    model = Configured(**MARKS)
    assert sample_lengths(model, "site", {"input_ids": IDS, "image_grid_thw": GRIDS}, 32) == [20, 0, 12]
    videos = IDS.masked_fill(IDS == PICTURE_TOKEN, VIDEO_TOKEN)
    assert sample_lengths(model, "site", {"input_ids": videos, "video_grid_thw": GRIDS}, 32, samples=3) == [20, 0, 12]


def test_a_tower_alone_has_one_picture_a_sample():
    assert sample_lengths(nn.Identity(), "site", {"grid_thw": GRIDS}, 32) == [4, 16, 12]
    assert sample_lengths(nn.Identity(), "site", torch.ones(32, 3), 32, samples=1) == [32]


@pytest.mark.parametrize(
    ("config", "batch", "tokens"),
    [
        (MARKS, {"input_ids": IDS, "image_grid_thw": GRIDS, "video_grid_thw": GRIDS}, 32),
        (MARKS, {"input_ids": IDS, "image_grid_thw": GRIDS}, 30),
        (MARKS, {"input_ids": IDS[1:2].expand(3, -1), "image_grid_thw": GRIDS}, 32),
        ({}, {"input_ids": IDS, "image_grid_thw": GRIDS}, 32),
        (MARKS, (IDS, GRIDS), 32),
    ],
)
def test_what_does_not_tell_is_refused_by_name(config, batch, tokens):
    with pytest.raises(InvalidInput, match=rf"tower.attn runs {tokens} tokens .* Give batches of one sample"):
        sample_lengths(Configured(**config), "tower.attn", batch, tokens)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_together_pictures_measure_as_one_by_one(name):
    family = VISION_LANGUAGE[name]
    batch = family.batch("left")
    needs = {"output_norm", "gram", "attention"}
    together = hp.observe(family.make(), [batch], needs)
    alone = hp.observe(family.make(), [family.one(batch, row) for row in range(3)], needs)
    for site in together:
        for field in ("projected_norm", "input_gram", "entropy"):
            assert torch.allclose(getattr(together[site], field), getattr(alone[site], field), rtol=1e-4, atol=1e-4), (site, field)
        assert together[site].projected_norm.shape == (3, 4)


def test_tiles_of_a_picture_are_one_sample():
    """Sample 0 has two pictures, sample 1 none, sample 2 one: all of these rows of the tower's batch."""
    family = VISION_LANGUAGE["internvl"]
    model, batch = family.make(), family.batch("right")
    batch["input_ids"][0, 4:8], batch["input_ids"][1, :4] = PICTURE_TOKEN, 9
    order = [0, 1, 2]
    alone = [{key: value[[row]] for key, value in batch.items()} for row in order]
    alone[0]["pixel_values"] = batch["pixel_values"][:2]
    del alone[1]["pixel_values"]
    needs = {"gate_gradient"}
    together = hp.observe(model, [batch], needs, loss_fn=next_token_losses)
    parts = [hp.observe(model, [one], needs, loss_fn=next_token_losses, unreached="keep") for one in alone]
    for site in together:
        expected = torch.cat([part[site].gate_gradient if part[site].reached else torch.zeros(1, 4) for part in parts])
        assert torch.allclose(together[site].gate_gradient, expected, rtol=1e-3, atol=1e-5), site


def next_token_losses(model, batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    return losses.sum(dim=1) / (labels != -100).sum(dim=1)


def test_pictures_that_do_not_take_equal_places_are_not_allotted():
    assert allotted(torch.tensor([8, 0, 4]), 3) == [2, 0, 1]
    assert allotted(torch.tensor([8, 0, 4]), 24) == [16, 0, 8]
    assert allotted(torch.tensor([9, 0, 4]), 3) is None
    assert allotted(torch.tensor([7, 5]), 3) is None
    assert allotted(torch.tensor([0, 0]), 3) is None


def test_padding_of_text_is_no_padding_of_pictures():
    family = VISION_LANGUAGE["qwen2_vl"]
    model, batch = family.make(), family.batch("left")
    masks = {site.name: token_masks(model)(site.name, batch) for site in hp.attention_sites(model)}
    assert all((mask is None) == (".visual." in name) for name, mask in masks.items())


def test_compensation_brings_the_outputs_nearer():
    family = VISION_LANGUAGE["qwen2_5_vl"]
    batches = 3 * [family.batch("left"), family.batch("right")]  # of two one would only choose the ridge
    cut, compensated, dense = family.make(), family.make(), family.make()
    keep = {site.name: [0, 1, 3] for site in hp.attention_sites(dense)}
    hp.cut(cut, keep)
    report = hp.prune(compensated, hp.PruningPlan.from_keep(compensated, keep), batches)
    assert all(resolved.error_after <= resolved.error_before for resolved in report)
    assert error(compensated, dense, batches) < 0.5 * error(cut, dense, batches)


def error(model, dense, batches) -> float:
    with torch.no_grad():
        return sum(
            float(((model(**one).logits - dense(**one).logits) * one["attention_mask"][..., None]).square().sum())
            for one in batches
        )
