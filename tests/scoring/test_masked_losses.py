import logging

import pytest
import torch
from masked_models import CASES, Layers, on_states
from tiny_models import llama, padded, tokens

from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.models.gating import gate_columns, output_input_hook
from headprune.scoring.causal_losses import causal_losses
from headprune.scoring.head_masks import by_site, head_counts, one_out, random_masks
from headprune.scoring.masked_losses import MaskedLosses, masked_losses
from headprune.scoring.sample_losses import OwnLoss


def one_by_one(model, loss_fn, batch, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """[n_masks, samples]: every mask in a pass of its own, by hooks."""
    rows, sites = [], {site.name: site for site in attention_sites(model)}
    with torch.no_grad():
        for index in range(len(next(iter(masks.values())))):
            handles = []
            for name, gates in masks.items():
                gate = gate_columns(gates[index][sites[name].head_of_column()])
                handles.append(output_input_hook(sites[name], gate))
                handles[-1].__enter__()
            rows.append((loss_fn or OwnLoss())(model, batch))
            for handle in handles:
                handle.__exit__(None, None, None)
    return torch.stack(rows)


def masks_for(model) -> dict[str, torch.Tensor]:
    """Every head out by itself, random sets, real gates, and one mask that changes nothing."""
    counts = head_counts(attention_sites(model))
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(3, sum(counts.values()), generator=generator)
    return by_site(torch.cat([one_out(counts), random_masks(counts, 5, 0.7, generator), gates, torch.ones_like(gates[:1])]), counts)


@pytest.mark.parametrize(("rows", "fills"), [(1, False), (7, False), (64, False), (7, True), (64, True)])
@pytest.mark.parametrize("case", CASES)
def test_losses_under_masks_are_those_of_one_pass_per_mask(case, rows, fills):
    make, runs = CASES[case]
    model, loss_fn, batch = make()
    masks = masks_for(model)
    masked = MaskedLosses(model, attention_sites(model), loss_fn, rows)
    masked.fills = fills
    found = masked.on(batch).losses(masks)
    expected = one_by_one(model, loss_fn, batch, masks)
    expected = expected if expected.dim() == 2 else expected[:, None].expand_as(found)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    heads = sum(gates.shape[1] for gates in masks.values())
    assert (expected[:heads] != expected[-1]).any(dim=1).all(), "a head without effect shows nothing"
    structure = masked.structure
    with masked.still():
        way = "singly" if structure is None else "replayed" if all(map(structure.replays, structure.gate_dim)) else "folded"
    assert way == runs


def test_a_model_that_cannot_be_folded_says_so_once(caplog):
    model, loss_fn, batch = CASES["coupled samples"][0]()
    masked = MaskedLosses(model, attention_sites(model), loss_fn)
    with caplog.at_level(logging.WARNING, logger="headprune"):
        for _ in range(3):
            masked.on(batch).losses(masks_for(model))
    assert [record.message for record in caplog.records if "by itself" in record.message] == [
        "BatchCoupled: masks cannot be folded into its batch: each mask is run by itself, which is slower"
    ]


def test_a_loss_that_runs_the_layers_itself_is_taken_mask_by_mask(caplog):
    """hp.causal_losses runs the layers, then the model's call for the head alone: no replay can start in that call."""
    model, batch = llama(), padded() | {"labels": padded()["input_ids"]}
    found, own = (masked_losses(model, batch, masks_for(model), loss_fn=loss_fn) for loss_fn in (causal_losses, None))
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    assert "the loss runs parts of the model beside its call: each mask is run by itself" in caplog.text


def test_batches_of_other_sizes_use_what_the_first_one_showed():
    model, loss_fn, batch = CASES["classifier"][0]()
    masked = MaskedLosses(model, attention_sites(model), loss_fn)
    masks, structures = masks_for(model), []
    for part in (batch, {name: values[:2, :7] if values.dim() == 2 else values[:2] for name, values in batch.items()}):
        found = masked.on(part).losses(masks)
        structures.append(masked.structure)
        assert torch.allclose(found, one_by_one(model, loss_fn, part, masks), rtol=1e-4, atol=1e-6)
    assert structures[0] is structures[1]


@pytest.mark.parametrize("order", [1, -1])
def test_batches_that_run_otherwise_can_be_held_at_once(order):
    """As a search holds them: each goes on by what its own pass looked like."""
    model, masks = llama(), {"model.layers.1.self_attn": torch.eye(8)}
    batches = [{"input_ids": tokens(), "labels": tokens()}, padded() | {"labels": tokens()}][::order]
    masked = MaskedLosses(model, attention_sites(model))
    held = [masked.on(batch) for batch in batches]
    for found, batch in zip(held, batches):
        assert torch.allclose(found.losses(masks), masked_losses(model, batch, masks), rtol=1e-4, atol=1e-6)


def test_a_replay_computes_only_what_comes_behind_the_heads():
    model, _, batch = CASES["encoder-decoder"][0]()
    found = MaskedLosses(model, attention_sites(model)).on(batch)
    one_closed = {"model.decoder.layers.1.self_attn": torch.tensor([[0.0, 1, 1, 1]])}
    found.losses(one_closed)  # which also proves that a pass can start again there
    ran = []

    def noted(name, forward):
        return lambda *args: (ran.append(name), forward(*args))[1]

    for name, module in model.named_modules():
        if name.endswith(("fc1", "q_proj")):
            module.forward = noted(name.removeprefix("model.decoder.layers."), module.forward)
    found.losses(one_closed)
    assert ran == ["1.encoder_attn.q_proj", "1.fc1"]


def test_a_replay_runs_the_users_own_hooks_once(caplog):
    model, batch = llama(layers=3), {"input_ids": tokens(), "labels": tokens()}
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, states: states * 1.5)
    masks = {attention_sites(model)[2].name: 1 - torch.eye(8)}
    found = masked_losses(model, batch, masks)
    torch.testing.assert_close(found, one_by_one(model, OwnLoss(), batch, masks))
    assert "start again" not in caplog.text


def test_low_precision_agrees_within_its_rounding():
    model, batch = llama().bfloat16(), {"input_ids": tokens(), "labels": tokens()}
    masks = masks_for(model)
    masked = MaskedLosses(model, attention_sites(model))
    assert torch.allclose(masked.on(batch).losses(masks), one_by_one(model, None, batch, masks), rtol=2e-2)
    assert all(map(masked.structure.replays, masked.structure.gate_dim))


def test_passes_shrink_until_memory_holds_them():
    model, loss_fn, batch = CASES["classifier"][0]()
    sizes = []

    def small_memory(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 6:
            raise torch.OutOfMemoryError

    model.bert.encoder.layer[1].register_forward_pre_hook(small_memory)
    masks = {name: rows[:8] for name, rows in masks_for(model).items()}
    found = MaskedLosses(model, attention_sites(model), loss_fn, 24).on(batch).losses(masks)
    assert torch.allclose(found, one_by_one(model, loss_fn, batch, masks), rtol=1e-4, atol=1e-6)
    assert max(sizes) > 6


def test_nothing_is_left_behind():
    model, loss_fn, batch = CASES["ragged llama"][0]()
    model.train()
    masked_losses(model, batch, masks_for(model), loss_fn=loss_fn)
    assert model.training
    assert model.config.use_cache
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


SITE = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"masks": {"model.layers.9.self_attn": torch.ones(2, 8)}}, "unknown attention site 'model.layers.9.self_attn'"),
        ({"masks": {SITE: torch.ones(2, 7)}}, r"have shape \[2, 7\]; expected \[n_masks, 8\]"),
        ({"masks": {SITE: torch.ones(2, 8), "model.layers.1.self_attn": torch.ones(3, 8)}}, r"masks of \[2, 3\] rows"),
        ({"masks": {}}, "one site at least"),
        ({"rows": 0}, "rows is 0"),
        ({"batch": {"input_ids": tokens()}}, "put labels into the batches"),
        ({"loss_fn": lambda model, batch: model(**batch).loss * torch.nan}, "loss is NaN"),
        ({"loss_fn": lambda model, batch: None}, "loss_fn gave NoneType"),
        ({"loss_fn": lambda model, batch: model(**batch).logits[..., 0]}, r"loss_fn gave \[3, 9\]; expected per-sample losses"),
    ],
)
def test_bad_input_is_named(arguments, names):
    given = {"batch": {"input_ids": tokens(), "labels": tokens()}, "masks": {SITE: torch.zeros(1, 8)}, **arguments}
    with pytest.raises(InvalidInput, match=names):
        masked_losses(llama(), given.pop("batch"), given.pop("masks"), **given)


def test_a_site_that_the_batch_does_not_reach_is_named():
    model, loss_fn, batch = on_states(Layers(2))
    model.forward = lambda states: states + model.layers[0](states, states, states, need_weights=False)[0]
    with pytest.raises(InvalidInput, match=r"layers\.1 is not reached by this batch"):
        masked_losses(model, batch, {"layers.1": torch.zeros(1, 4)}, loss_fn=loss_fn)
    assert masked_losses(model, batch, {"layers.0": torch.zeros(1, 4)}, loss_fn=loss_fn).shape == (1, 3)
