"""Denoisers of diffusers: attentions that are recognised by what they are made of, from scores to a model that loads."""

import copy

import pytest
import torch

import headprune as hp

diffusers = pytest.importorskip("diffusers")
TIMES = torch.tensor([3, 500])


def dit():
    """A diffusion transformer conditioned on classes; self attention alone."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 2])}


def pixart():
    """Self and cross attention in turn."""
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=16, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    batch = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16), "timestep": TIMES}
    return model, batch | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def unet():
    """As Stable Diffusion's: convolutions with transformer blocks between."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16), "timestep": TIMES}


def built(make):
    torch.manual_seed(0)
    model, batch = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates that start at 0 hide what is behind them
                parameter.normal_(std=0.1)
    return model.eval(), batch


def loss(model, batch):
    """Of each sample; the noise that is to be told is the input itself."""
    noise = batch["sample" if "sample" in batch else "hidden_states"]
    return (model(**batch).sample - noise).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("make", "kinds"), [(dit, ["self"] * 2), (pixart, ["self", "cross"] * 2), (unet, ["self", "cross"] * 4)])
def test_denoisers_go_the_whole_way(make, kinds, tmp_path):
    model, batch = built(make)
    sites = hp.attention_sites(model)
    assert [site.kind for site in sites] == kinds
    keep = {site.name: [0, 3] if index % 2 else [1, 2, 3] for index, site in enumerate(sites)}
    run = lambda one: one(**batch).sample  # noqa: E731
    with torch.no_grad():
        with hp.gated(model, keep):
            expected = run(model)
        cut = copy.deepcopy(model)
        hp.cut(cut, keep, run=run)
        torch.testing.assert_close(run(cut), expected, rtol=1e-5, atol=1e-5)
        assert float((run(model) - expected).norm()) > 1e-3
    scores = hp.score(model, [batch], ["fisher", "least_squares"], loss_fn=loss)
    plan = hp.plan(scores["fisher"], hp.Budget(heads=0.5))
    pruned = copy.deepcopy(model)
    hp.prune(pruned, plan, [batch], forward=lambda one, inputs: one(**inputs))
    assert sum(site.head_map.query_heads for site in hp.attention_sites(pruned)) == 2 * len(sites)
    hp.save(pruned, tmp_path / "pruned")
    with torch.no_grad():
        torch.testing.assert_close(run(hp.load(tmp_path / "pruned", model=copy.deepcopy(model))), run(pruned), rtol=0, atol=0)


@pytest.mark.parametrize("make", [dit, pixart, unet])
def test_an_attention_of_a_denoiser_may_lose_all_heads(make, tmp_path):
    model, batch = built(make)
    first, second = hp.attention_sites(model)[:2]
    keep = {first.name: [], second.name: [1]}
    run = lambda one: one(**batch).sample  # noqa: E731
    with torch.no_grad():
        with hp.gated(model, keep):
            expected = run(model)
        cut = copy.deepcopy(model)
        hp.cut(cut, keep, run=run)
        torch.testing.assert_close(run(cut), expected, rtol=1e-5, atol=1e-5)
        hp.save(cut, tmp_path / "cut")
        torch.testing.assert_close(run(hp.load(tmp_path / "cut", model=model)), run(cut), rtol=0, atol=0)
