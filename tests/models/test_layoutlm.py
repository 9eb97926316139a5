"""LayoutLM v2 and v3: biases of positions on a page, which the encoder makes once for all heads of all layers."""

import pytest
import torch
from tiny_encoders import ENCODERS, PAGE, page_batch, page_reader

import headprune as hp
from headprune.models.tiny_inputs import tiny_inputs

READERS = {name: ENCODERS[name] for name in ("layoutlmv2", "layoutlmv2_separate", "layoutlmv3", "layoutlmv3_seen")}


def calibration(name: str, without=()) -> list[dict]:
    batches = [READERS[name].batch(side) for side in ("left", "right")] * 3
    generator = torch.Generator().manual_seed(0)
    drawn = [{**batch, "input_ids": batch["input_ids"][:, torch.randperm(9, generator=generator)]} for batch in batches]
    return [{key: value for key, value in batch.items() if key not in without} for batch in drawn]


def logits(model, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**READERS[name].batch("left")).logits


def same_weights(found, expected) -> bool:
    theirs = expected.state_dict()
    return list(found.state_dict()) == list(theirs) and all(
        torch.equal(mine, theirs[key]) for key, mine in found.state_dict().items()
    )


@pytest.mark.parametrize("name", READERS)
def test_scored_pruned_and_pruned_again_from_memory_and_from_the_disk(name, tmp_path):
    model = READERS[name].make()
    tables = {key: value.clone() for key, value in model.state_dict().items() if ".rel_pos" in key}
    assert len(tables) == 3
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    scores = hp.score(model, calibration(name), criterion="fisher")
    streamed = hp.score(hp.open_streamed(tmp_path / "dense"), calibration(name), criterion="fisher")
    assert all(torch.equal(streamed[site], scores[site]) for site in scores)
    plan = hp.plan(scores, hp.Budget(heads=0.6))
    before, dense = logits(model, name), hp.load(tmp_path / "dense")
    hp.prune(model, plan, calibration(name))
    hp.cut(dense, plan)
    assert (logits(model, name) - before).norm() < (logits(dense, name) - before).norm()
    hp.prune_folder(tmp_path / "dense", plan, tmp_path / "once", calibration(name))
    assert same_weights(hp.load(tmp_path / "once"), model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in tables.items())

    again = hp.plan(hp.score(model, calibration(name), criterion="fisher"), hp.Budget(heads=0.5))
    with hp.gated(model, again):
        expected = logits(model, name)
    hp.cut(model, again)
    assert (logits(model, name) - expected).abs().max() <= 1e-5
    hp.prune_folder(tmp_path / "once", again, tmp_path / "twice")
    assert same_weights(hp.load(tmp_path / "twice"), model)
    assert torch.equal(logits(hp.load(tmp_path / "twice"), name), logits(model, name))


@pytest.mark.parametrize(
    "biases", [("has_relative_attention_bias",), ("has_relative_attention_bias", "has_spatial_attention_bias")]
)
def test_readers_with_fewer_biases(biases):
    model = page_reader("v3", page_batch, **PAGE, **dict.fromkeys(biases, False)).make()
    keep = {site.name: [0, 3] for site in hp.attention_sites(model)}
    with hp.gated(model, keep):
        expected = logits(model, "layoutlmv3")
    hp.cut(model, keep)
    assert (logits(model, "layoutlmv3") - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", READERS)
def test_the_check_before_a_cut_reads_words_at_places(name):
    """At one place all words would have the same bias, which changes no attention."""
    boxes = tiny_inputs(READERS[name].make())["bbox"]
    assert boxes.flatten(0, 1).unique(dim=0).shape[0] > 6
    assert (boxes[..., :2] <= boxes[..., 2:]).all()
