"""Models built on BERT's attention whose outputs are no classes: whatever is pruned, the model is its gated original."""

import pytest
import torch
import transformers
from tiny_encoders import PICTURE, SIZES, TEXT
from tiny_models import padded

import headprune as hp

EVERY = ["eager", "sdpa", "headprune"]
SMALL = {**PICTURE, **SIZES, "patch_size": 8}
VILT = {**PICTURE, **TEXT, "patch_size": 8}
PARTS = {"text_config": {**SIZES, "vocab_size": TEXT["vocab_size"]}, "image_config": SMALL, "multimodal_config": SIZES}
MODELS = {
    "YolosModel": (transformers.YolosConfig, {**SMALL, "image_size": [16, 16], "num_detection_tokens": 3}, EVERY),
    "DPTModel": (transformers.DPTConfig, {**SMALL, "is_hybrid": False, "backbone_out_indices": [0, 1, 1, 1]}, EVERY),
    "ViltModel": (transformers.ViltConfig, VILT, ["eager"]),
    "FlavaModel": (transformers.FlavaConfig, PARTS, ["eager"]),
}


def made(name: str, implementation: str):
    torch.manual_seed(0)
    config, options, _ = MODELS[name]
    config = config(**options)
    config._attn_implementation = implementation
    return getattr(transformers, name)(config).eval()


def states(model) -> torch.Tensor:
    torch.manual_seed(0)  # ViLT draws the order of its patches
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    inputs |= padded() if hasattr(model.config, "text_config") or hasattr(model.config, "vocab_size") else {}
    with torch.no_grad():
        found = model(**inputs)
    return found["multimodal_embeddings" if "multimodal_embeddings" in found else "last_hidden_state"]


@pytest.mark.parametrize(("name", "implementation"), [(name, way) for name, (*_, ways) in MODELS.items() for way in ways])
def test_cutting_equals_gating_and_survives_the_disk(name, implementation, tmp_path):
    model = made(name, implementation)
    sites = hp.attention_sites(model)
    keep = {site.name: [[0, 3], [1], [], [0, 1, 2]][index % 4] for index, site in enumerate(sites)}
    dense = states(model)
    with hp.gated(model, keep):
        expected = states(model)
    hp.cut(model, keep)
    assert (states(model) - expected).abs().max() <= 1e-5
    assert (dense - expected).abs().max() > 1e-2
    hp.save(model, tmp_path / "model")
    again = hp.load(tmp_path / "model", attn_implementation=implementation)
    assert torch.allclose(states(again), states(model), rtol=0, atol=1e-6)
    assert [site.head_map for site in hp.attention_sites(again)] == [site.head_map for site in hp.attention_sites(model)]
