import pytest
import torch
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_vision_language import VISION_LANGUAGE

from headprune.models import attention_sites
from headprune.models.tokens import token_masks


def masks(family, batch=None):
    model, batch = family.make(), batch or family.batch("right")
    found = token_masks(model)
    return {site.name: found(site.name, batch) for site in attention_sites(model)}


def test_an_encoder_counts_what_its_mask_shows():
    batch = ENCODERS["bert"].batch("right")
    assert all(torch.equal(mask, batch["attention_mask"]) for mask in masks(ENCODERS["bert"], batch).values())


def test_a_decoder_counts_its_own_tokens_and_not_the_encoders():
    batch = SEQ2SEQ["t5"].batch("right")
    found = masks(SEQ2SEQ["t5"], batch)
    assert torch.equal(found["encoder.block.1.layer.0.SelfAttention"], batch["attention_mask"])
    for name in ("decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"):
        assert torch.equal(found[name], batch["labels"] != -100)
    batch["decoder_attention_mask"] = torch.ones(3, 6)
    assert torch.equal(masks(SEQ2SEQ["t5"], batch)["decoder.block.2.layer.0.SelfAttention"], batch["decoder_attention_mask"])


def test_sound_and_pictures_have_no_token_mask():
    found = masks(SEQ2SEQ["whisper"])
    assert found["model.encoder.layers.0.self_attn"] is None
    assert found["model.decoder.layers.0.encoder_attn"].shape == (3, 6)
    found = masks(VISION["clip"])
    assert all((mask is None) == name.startswith("vision_model.") for name, mask in found.items())


@pytest.mark.parametrize("name", ["layoutlmv2", "layoutlmv3_seen"])
def test_the_places_of_a_pages_picture_count_behind_its_words(name):
    batch = ENCODERS[name].batch("right")
    for mask in masks(ENCODERS[name], batch).values():
        assert torch.equal(mask[:, :9], batch["attention_mask"])
        assert mask[:, 9:].all()
        assert mask.shape[1] == 9 + {"layoutlmv2": 2 * 2, "layoutlmv3_seen": 2 * 2 + 1}[name]


def test_a_given_mask_counts_everywhere():
    model = SEQ2SEQ["bart"].make()
    mask = token_masks(model, lambda batch: batch["mine"])
    assert all(mask(site.name, {"mine": 1}) == 1 for site in attention_sites(model))


def test_a_q_former_reads_queries_and_text_of_its_own():
    found = masks(VISION_LANGUAGE["blip_2"])
    assert all((mask is None) == (not name.startswith("language_model.")) for name, mask in found.items())
    batch = VISION_LANGUAGE["instructblip"].batch("left")
    found = masks(VISION_LANGUAGE["instructblip"], batch)
    assert torch.equal(found["qformer.encoder.layer.1.attention"][:, 4:], batch["qformer_attention_mask"])
    assert found["qformer.encoder.layer.1.attention"][:, :4].all()
    assert found["qformer.encoder.layer.0.crossattention"] is None


def test_torchs_own_padding_masks_are_read_by_their_names():
    model = torch.nn.ModuleDict({"whole": torch.nn.Transformer(16, 4, 1, 1, 32, batch_first=True)})
    source, target = torch.arange(6) >= torch.tensor([[6], [3]]), torch.arange(4) >= torch.tensor([[2], [4]])
    of_site = token_masks(model)
    batch = {"src_key_padding_mask": source, "tgt_key_padding_mask": torch.zeros(2, 4).masked_fill(target, float("-inf"))}
    assert torch.equal(of_site("whole.encoder.layers.0.self_attn", batch), ~source)
    for name in ("self_attn", "multihead_attn"):
        assert torch.equal(of_site(f"whole.decoder.layers.0.{name}", batch), ~target)
    assert of_site("whole.encoder.layers.0.self_attn", {"src": source}) is None
