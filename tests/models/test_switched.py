"""BigBird's attention of long texts, and what takes its place where texts are short."""

import copy

import pytest
import torch
from tiny_encoders import ENCODERS, SEQ2SEQ, target_batch, text_batch

import headprune as hp

FAMILIES = {"big_bird": (ENCODERS["big_bird"], text_batch), "bigbird_pegasus": (SEQ2SEQ["bigbird_pegasus"], target_batch)}


def output(model, batch) -> torch.Tensor:
    counted = batch["labels"] != -100
    with torch.no_grad():
        return model(**batch).logits * counted[..., None]


def kinds(model) -> set[str]:
    found = {type(module).__name__ for module in model.modules() if hasattr(module, "attention_head_size")}
    return {name.removeprefix("BigBird").removeprefix("Pegasus") for name in found}


@pytest.mark.parametrize("kept", [[0, 2, 3], []])
@pytest.mark.parametrize("name", FAMILIES)
def test_short_texts_are_read_with_the_heads_that_are_left(name, kept):
    family, short = FAMILIES[name]
    model = family.make()
    keep = {site.name: [[1], kept][index % 2] for index, site in enumerate(hp.attention_sites(model))}
    pruned = copy.deepcopy(model)
    hp.cut(pruned, keep)
    for batch in (family.batch("right"), short("right")):
        with hp.gated(model, keep):
            expected = output(model, batch)
        assert (output(pruned, batch) - expected).abs().max() <= 1e-5
    assert kinds(pruned) == {"SelfAttention"}
    assert [site.head_map for site in hp.attention_sites(pruned)] == [
        site.head_map.keep(keep[site.name]) for site in hp.attention_sites(model)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_before_a_cut_leaves_the_sparse_attention(name):
    model = FAMILIES[name][0].make()
    hp.cut(model, {site.name: [0, 1] for site in hp.attention_sites(model)})
    assert kinds(model) == {"BlockSparseAttention"}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_has_read_short_texts_survives_the_disk(name, tmp_path):
    family, short = FAMILIES[name]
    model, batch = family.make(), short("right")
    hp.cut(model, {site.name: [0, 3] for site in hp.attention_sites(model)})
    expected = output(model, batch)
    hp.save(model, tmp_path / "model")
    assert torch.allclose(output(hp.load(tmp_path / "model"), batch), expected, rtol=0, atol=1e-6)
