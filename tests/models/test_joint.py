"""Denoisers whose attention joins two streams of tokens, each with projections of its own."""

import copy
import random

import pytest
import torch

import headprune as hp
from headprune.evaluation.token_counts import count_tokens_of_sites
from headprune.schedules.gates.reach import gates_in_place
from headprune.surgery.fold import fold_gates
from headprune.surgery.verify import cut_error

diffusers = pytest.importorskip("diffusers")


def sd3(**options):
    """As Stable Diffusion 3; the last attention gives nothing back to the text."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16,
        caption_projection_dim=32, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8, **options,
    )  # fmt: skip
    batch = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16)}
    return model, batch | {"pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([3, 500])}


def sd35():
    """As Stable Diffusion 3.5: normed queries and keys, and attentions of the picture alone beside the joint ones."""
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def flux():
    """As Flux: attentions of two streams, then of one beside a feed-forward."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    batch = {"hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 16)}
    batch |= {"pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([0.1, 0.7])}
    return model, batch | {"img_ids": torch.randint(0, 4, (6, 3)).float(), "txt_ids": torch.zeros(5, 3)}


def built(make, dtype=torch.float32):
    torch.manual_seed(0)
    model, batch = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates that start at 0 hide what is behind them
                parameter.normal_(std=0.1)
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    return model.eval().requires_grad_(False).to(dtype), batch


def loss(model, batch):
    """Of each sample; the noise that is to be told is the input itself."""
    return (model(**batch).sample - batch["hidden_states"]).square().flatten(1).mean(dim=1)


def some_heads(sites, seed):
    """Any number of heads of each site, none too."""
    chosen = random.Random(seed)
    keep = {site.name: sorted(chosen.sample(range(4), chosen.randint(0, 4))) for site in sites}
    return keep | {sites[seed % len(sites)].name: [], sites[(seed + 1) % len(sites)].name: [seed % 4]}


JOINT = pytest.mark.parametrize("make", [sd3, sd35, flux])


@JOINT
@pytest.mark.parametrize("seed", range(4))
def test_cutting_heads_of_both_streams_equals_gating_them(make, seed):
    model, batch = built(make, torch.float64)
    keep = some_heads(hp.attention_sites(model), seed)
    with hp.gated(model, keep):
        expected = model(**batch).sample
    assert float((model(**batch).sample - expected).norm()) > 1e-3
    hp.cut(model, keep, run=lambda one: one(**batch))
    torch.testing.assert_close(model(**batch).sample, expected, rtol=1e-10, atol=1e-10)


@JOINT
def test_a_gate_gradient_is_that_of_a_gate_on_both_outputs(make):
    model, batch = built(make)
    sites = {site.name: site for site in hp.attention_sites(model)}
    assert max(len(site.outputs) for site in sites.values()) == 2
    gates = {name: torch.ones(2, 4, requires_grad=True) for name in sites}
    for sample in range(2):
        alone = {name: part if name.endswith("_ids") else part[sample : sample + 1] for name, part in batch.items()}
        with gates_in_place(sites, frozenset(), {name: rows[sample] for name, rows in gates.items()}):
            loss(model, alone).sum().backward()
    observed = hp.observe(model, [batch], {"gate_gradient"}, loss_fn=loss)
    for name, rows in gates.items():
        torch.testing.assert_close(observed[name].gate_gradient, rows.grad, rtol=1e-4, atol=1e-6)


@JOINT
def test_a_joint_denoiser_goes_the_whole_way(make, tmp_path):
    model, batch = built(make)
    batches = [{**batch, "hidden_states": torch.randn_like(batch["hidden_states"])} for _ in range(14)]
    scores = hp.score(model, batches[:2], ["fisher", "ablation", "magnitude_l2"], loss_fn=loss)
    plan = hp.plan(scores["fisher"], hp.Budget(heads=0.5), min_heads=0)
    run = lambda one: one(**batch).sample  # noqa: E731
    plainly, pruned = copy.deepcopy(model), copy.deepcopy(model)
    hp.cut(plainly, plan, run=run)
    report = hp.prune(pruned, plan, batches, forward=lambda one, inputs: one(**inputs))
    assert {f"{name}.to_add_out" for name in list(plan)[:1]} < {resolved.site for resolved in report}
    assert cut_error(model, pruned, plan, run) < 1e-5
    assert (run(pruned) - run(model)).norm() < (run(plainly) - run(model)).norm()
    hp.save(pruned, tmp_path / "pruned")
    torch.testing.assert_close(run(hp.load(tmp_path / "pruned", model=model)), run(pruned), rtol=0, atol=0)


@JOINT
def test_gates_fold_into_all_outputs(make):
    model, batch = built(make)
    sites = {site.name: site for site in hp.attention_sites(model)}
    gates = {name: torch.rand(4) for name in sites}
    with gates_in_place(sites, frozenset(), gates):
        expected = model(**batch).sample
    fold_gates(model, gates)
    torch.testing.assert_close(model(**batch).sample, expected, rtol=1e-5, atol=1e-5)


def test_tokens_of_both_streams_are_counted():
    model, batch = built(flux)
    sites = hp.attention_sites(model)
    counts = count_tokens_of_sites(model, sites, lambda: model(**batch))
    assert {(count.queries, count.keys, count.pairs) for count in counts.values()} == {(2 * 11, 2 * 11, 2 * 11 * 11)}


@pytest.mark.parametrize("criterion", ["least_squares", "output_norm"])
def test_what_goes_into_one_projection_is_no_score_of_two(criterion):
    model, batch = built(sd3)
    with pytest.raises(hp.InvalidInput, match=r"transformer_blocks\.0\.attn projects its heads twice"):
        hp.score(model, [batch], criterion, loss_fn=loss)


def test_fused_projections_are_refused_by_name():
    model, _ = built(sd3)
    model.fuse_qkv_projections()
    with pytest.raises(hp.UnsupportedModel, match=r"transformer_blocks\.0\.attn"):
        hp.attention_sites(model)
