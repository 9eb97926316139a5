"""Tiny random models that look at pictures and read text, the vision towers of Qwen-VL and its relatives among them: these take
the patches of all pictures of a batch as one packed sequence."""

from __future__ import annotations

import torch
from tiny_encoders import EVERY, QUIET, SIZES, TEXT, Family, picture_batch
from tiny_models import VOCABULARY, padded
from torch import Tensor

PICTURE_TOKEN, VIDEO_TOKEN = 7, 8
MARKS = {"image_token_id": PICTURE_TOKEN, "video_token_id": VIDEO_TOKEN}
PATCH = {"in_channels": 3, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2, "initializer_range": 0.2}
TOWER = {**PATCH, "depth": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
READER = {
    **SIZES, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}  # fmt: skip
GRIDS = torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 2]])  # frames, rows and columns of patches, of one picture a row


def packed_batch(side: str) -> dict[str, Tensor]:
    """Text of three lengths, padded, with a picture of another size in each; labels where there is text."""
    text = padded(length=12, side=side)
    ids = text["input_ids"].masked_fill((text["input_ids"] == PICTURE_TOKEN) | (text["input_ids"] == VIDEO_TOKEN), 9)
    for row, patches in enumerate(GRIDS.prod(1).tolist()):
        ids[row, 3 : 3 + patches // 4] = PICTURE_TOKEN
    pictures = ids == PICTURE_TOKEN
    generator = torch.Generator().manual_seed(5 if side == "left" else 6)
    return {
        "input_ids": ids,
        "attention_mask": text["attention_mask"],
        "mm_token_type_ids": pictures.int(),
        "pixel_values": torch.randn(int(GRIDS.prod(1).sum()), 3 * 4 * 4, generator=generator),
        "image_grid_thw": GRIDS,
        "labels": ids.masked_fill((text["attention_mask"] == 0) | pictures, -100),
    }


def packed_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of `packed_batch`."""
    starts = [0, *GRIDS.prod(1).cumsum(0).tolist()]
    own = {name: value[[row]] for name, value in batch.items() if name != "pixel_values"}
    return {**own, "pixel_values": batch["pixel_values"][starts[row] : starts[row + 1]]}


def packed(name: str, tower: dict, reader: dict | None = None, implementations: tuple[str, ...] = EVERY) -> Family:
    options = {"vision_config": {**TOWER, **tower}, "text_config": {**READER, **(reader or {})}, **MARKS}
    return Family(f"{name}ForConditionalGeneration", f"{name}Config", options, packed_batch, implementations, packed_row)


def described_batch(side: str) -> dict[str, Tensor]:
    """A picture and a padded text that describes it."""
    text = padded(side=side)
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    return {"pixel_values": picture_batch(side)["pixel_values"], **text, "labels": labels}


PLACES = 4  # that a picture takes among the tokens


def prompted_batch(side: str) -> dict[str, Tensor]:
    """A text whose first tokens are a picture's; padding on the other side only, so that the picture stays where it is."""
    batch = described_batch("right" if side == "left" else side)
    pixels = picture_batch(side)["pixel_values"]
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == PICTURE_TOKEN, 9)
    ids[:, :PLACES] = PICTURE_TOKEN
    return {**batch, "pixel_values": pixels, "input_ids": ids, "labels": batch["labels"].index_fill(1, torch.arange(PLACES), -100)}


def instructed_batch(side: str) -> dict[str, Tensor]:
    """And a text of its own, padded, for the Q-Former."""
    text = padded(length=7, side=side)
    return {**prompted_batch(side), **{f"qformer_{name}": value for name, value in text.items()}}


EYE = {**SIZES, "image_size": 16, "patch_size": 4, "attention_dropout": 0.0}
BLIP = {
    "vision_config": EYE,
    "text_config": {**TEXT, **QUIET, "encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
    "projection_dim": 16,
}  # fmt: skip
QFORMER = {**TEXT, **QUIET, "encoder_hidden_size": 32, "cross_attention_frequency": 2}
OPT = {
    **TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BLIP2 = {
    "vision_config": {**EYE, "qkv_bias": True}, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": PLACES,
    "image_token_index": PICTURE_TOKEN, "initializer_range": 0.2,
}  # fmt: skip
READS = {"text_config": {**READER, "model_type": "qwen2", "use_sliding_window": False}, "image_token_id": PICTURE_TOKEN}
INTERN = {
    "vision_config": {**EYE, "use_qk_norm": True, "norm_type": "rms_norm", "layer_scale_init_value": 1.0},
    "image_seq_length": PLACES, **READS,
}  # fmt: skip
JANUS = {
    "vision_config": {**EYE, "patch_size": 8, "num_image_tokens": 4, "projection_dim": 32, "depth": 1},
    "vq_config": {
        "embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
        "latent_channels": 8,
    },
    "text_config": {**READER, "model_type": "llama"}, "image_token_id": PICTURE_TOKEN,
}  # fmt: skip
GOT = {
    "vision_config": {**EYE, "patch_size": 2, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48, "output_channels": 16},
    "image_seq_length": PLACES, "image_token_index": PICTURE_TOKEN, "text_config": READS["text_config"],
}  # fmt: skip
WINDOWS = {"window_size": 8, "fullatt_block_indexes": [1]}
VISION_LANGUAGE = {
    "qwen2_vl": packed("Qwen2VL", {"embed_dim": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": packed("Qwen2_5_VL", WINDOWS),
    "qwen3_vl": packed("Qwen3VL", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "glm4v": packed("Glm4v", {"image_size": 16}),
    "blip": Family("BlipForConditionalGeneration", "BlipConfig", BLIP, described_batch, ("eager",)),
    "blip_2": Family("Blip2ForConditionalGeneration", "Blip2Config", BLIP2, prompted_batch),
    "instructblip": Family("InstructBlipForConditionalGeneration", "InstructBlipConfig", BLIP2, instructed_batch),
    "internvl": Family("InternVLForConditionalGeneration", "InternVLConfig", INTERN, prompted_batch),
    "janus": Family("JanusForConditionalGeneration", "JanusConfig", JANUS, prompted_batch),
    "got_ocr2": Family("GotOcr2ForConditionalGeneration", "GotOcr2Config", GOT, prompted_batch, ("eager",)),
    # Its tower has groups, which become ragged.
    "exaone4_5": packed(
        "Exaone4_5_", {**WINDOWS, "num_key_value_heads": 2}, {"model_type": "exaone4", "sliding_window": 8}, ("headprune",)
    ),
}
