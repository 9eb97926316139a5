"""Bark: three transformers in one model of speech, whose attentions have a layout of their own."""

import pytest
import torch
from transformers import BarkCoarseConfig, BarkConfig, BarkFineConfig, BarkModel, BarkSemanticConfig, EncodecConfig

import headprune as hp

SIZES = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "block_size": 32, "input_vocab_size": 61, "output_vocab_size": 61,
    "dropout": 0.0, "initializer_range": 0.2,
}  # fmt: skip
KEPT = {"some": [[0, 2], [1]], "first emptied": [[], [0, 1, 3]]}


def bark() -> BarkModel:
    torch.manual_seed(0)
    config = BarkConfig(
        semantic_config=BarkSemanticConfig(**SIZES).to_dict(),
        coarse_acoustics_config=BarkCoarseConfig(**SIZES).to_dict(),
        fine_acoustics_config=BarkFineConfig(**SIZES, n_codes_total=3).to_dict(),
        codec_config=EncodecConfig(hidden_size=16, num_filters=4, codebook_size=16).to_dict(),
    )
    return BarkModel(config).eval()


@torch.no_grad()
def outputs(model: BarkModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    codes = ids[..., None].expand(-1, -1, 3)
    found = {}
    for name in ("semantic", "coarse_acoustics"):
        part = getattr(model, name)
        found[name] = part(ids, attention_mask=mask).logits * mask[..., None]
        first = part(ids[:, :5], use_cache=True)
        found[f"{name}, cached"] = part(ids[:, 5:6], past_key_values=first.past_key_values, use_cache=True).logits
    return found | {"fine_acoustics": model.fine_acoustics(1, codes).logits}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_cutting_equals_gating_and_survives_the_disk(kept, tmp_path):
    model = bark()
    sites = [site.name for site in hp.attention_sites(model)]
    assert len(sites) == 6
    keep = dict(zip(sites, kept * 3))
    whole = outputs(model)
    with hp.gated(model, keep):
        expected = outputs(model)
    hp.cut(model, keep, verify=False)
    found = outputs(model)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
        assert (whole[name] - expected[name]).abs().max() > 1e-2, name
    hp.save(model, tmp_path / "model")
    again = outputs(hp.load(tmp_path / "model"))
    assert all(torch.allclose(again[name], found[name], atol=1e-6) for name in found)
