"""Encoders, encoder-decoders and vision models of transformers: whatever is pruned, the model is its gated original."""

import copy
import random

import pytest
import torch
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION, Family
from tiny_vision_language import VISION_LANGUAGE

import headprune as hp

FAMILIES = {**ENCODERS, **SEQ2SEQ, **VISION, **VISION_LANGUAGE}
RUNS = [(name, implementation) for name, family in FAMILIES.items() for implementation in family.implementations]


def drawn(sites, seed: int = 0) -> dict[str, list[int]]:
    """Some heads of each attention, at least one."""
    generator = random.Random(seed)
    return {
        site.name: sorted(generator.sample(range(site.head_map.query_heads), generator.randint(1, site.head_map.query_heads - 1)))
        for site in sites
    }


def one_each(sites) -> dict[str, list[int]]:
    return {site.name: [index % site.head_map.query_heads] for index, site in enumerate(sites)}


def without_every_second(first: int):
    """Every second attention loses all its heads, the others some."""
    return lambda sites: drawn(sites) | {site.name: [] for site in sites[first::2]}


PLANS = {
    "drawn": drawn,
    "drawn again": lambda sites: drawn(sites, 1),
    "one each": one_each,
    "none in even": without_every_second(0),
    "none in odd": without_every_second(1),
}


def output(model, batch) -> torch.Tensor:
    """The first tensor that the model gives, with rows that do not count set to 0."""
    with torch.no_grad():
        found = model(**batch)
    logits = next(found[name] for name in ("logits", "logits_per_image") if name in found)
    counted = batch.get("labels")
    of_tokens = counted is not None and logits.dim() == 3 and counted.shape == logits.shape[:2]
    return logits * (counted != -100)[..., None] if of_tokens else logits


def batches(family: Family) -> list[dict]:
    return [family.batch("left"), family.batch("right")]


@pytest.mark.parametrize(("name", "implementation"), RUNS)
def test_cutting_equals_gating(name, implementation):
    family = FAMILIES[name]
    for plan in PLANS.values():
        model = family.make(implementation)
        keep = plan(hp.attention_sites(model))
        dense = [output(model, batch) for batch in batches(family)]
        with hp.gated(model, keep):
            expected = [output(model, batch) for batch in batches(family)]
        hp.cut(model, keep)
        found = [output(model, batch) for batch in batches(family)]
        assert model.config._attn_implementation == implementation
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected)) <= 1e-5
        assert max(float((a - b).abs().max()) for a, b in zip(dense, expected)) > 1e-2, "the plan removed nothing that matters"


@pytest.mark.parametrize("name", FAMILIES)
def test_two_prunings_equal_one(name):
    twice, once = FAMILIES[name].make(), FAMILIES[name].make()
    sites = hp.attention_sites(twice)
    first = {site.name: list(range(site.head_map.query_heads))[1:] for site in sites}
    then = {site.name: [index % len(first[site.name])] for index, site in enumerate(sites)}
    hp.cut(twice, first)
    hp.cut(twice, then)
    hp.cut(once, {name: [first[name][head] for head in heads] for name, heads in then.items()})
    batch = FAMILIES[name].batch("right")
    assert torch.equal(output(twice, batch), output(once, batch))
    assert twice.config.headprune == once.config.headprune


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_survives_the_disk(name, tmp_path):
    model, batch = FAMILIES[name].make(), FAMILIES[name].batch("left")
    hp.cut(model, drawn(hp.attention_sites(model)))
    hp.save(model, tmp_path / "model")
    again = hp.load(tmp_path / "model", attn_implementation=model.config._attn_implementation)
    # Convolutions (MobileViT) may add in another order in other memory.
    assert torch.allclose(output(again, batch), output(model, batch), rtol=0, atol=1e-6)
    assert [site.head_map for site in hp.attention_sites(again)] == [site.head_map for site in hp.attention_sites(model)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_after_the_cut_lowers_the_loss(name):
    model, batch = FAMILIES[name].make(), FAMILIES[name].batch("right")
    hp.cut(model, drawn(hp.attention_sites(model)))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    assert model(**batch).loss < before


@pytest.mark.parametrize("name", FAMILIES)
def test_every_head_of_every_attention_gets_a_score(name):
    family = FAMILIES[name]
    model = family.make()
    state = copy.deepcopy(model.state_dict())
    scores = hp.score(model, batches(family), criterion=["fisher", "fisher_least_squares"])
    for found in scores.values():
        assert list(found) == [site.name for site in hp.attention_sites(model)]
        assert all(torch.isfinite(found[site]).all() and found[site].abs().max() > 0 for site in found)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_gate_gradients_are_of_single_samples(name):
    """Whatever an attention makes of its batch (windows, say): together as one by one."""
    if name == "clip":
        pytest.skip("its loss compares the samples of a batch")
    if name == "cvt":
        pytest.skip("torch's gradient of a convolution before a batch norm is wrong for a single permuted picture (2.13, CPU)")
    model, batch = FAMILIES[name].make(), FAMILIES[name].batch("right")
    each = next_token_loss_of_each if name in VISION_LANGUAGE else loss_of_each
    together = hp.observe(model, [batch], {"gate_gradient"}, loss_fn=each)
    own = each if name == "prophetnet" else None  # its own loss is that of the tokens behind the next one too
    alone = hp.observe(model, [FAMILIES[name].one(batch, row) for row in range(3)], {"gate_gradient"}, loss_fn=own)
    for site in together:
        assert together[site].gate_gradient.shape[0] == 3
        assert torch.allclose(together[site].gate_gradient, alone[site].gate_gradient, rtol=1e-3, atol=1e-4)


def loss_of_each(model, batch) -> torch.Tensor:
    return mean_of_each(model(**batch).logits, batch["labels"])


def next_token_loss_of_each(model, batch) -> torch.Tensor:
    return mean_of_each(model(**batch).logits[:, :-1], batch["labels"][:, 1:])


def mean_of_each(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").view(len(labels), -1)
    return losses.sum(dim=1) / (labels != -100).view(len(labels), -1).sum(dim=1)
