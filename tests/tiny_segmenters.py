"""Tiny random SAM, SAM-HQ and ViTDet: vision attentions over windows of pictures; they give no loss."""

from __future__ import annotations

import torch
from tiny_encoders import SIZES, Family
from torch import Tensor

PICTURE = {**SIZES, "image_size": 16, "patch_size": 2, "mlp_dim": 48}
SAM = {
    "vision_config": {**PICTURE, "window_size": 3, "global_attn_indexes": [1], "output_channels": 16, "num_pos_feats": 8},
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 16, "patch_size": 2, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        "attention_downsample_rate": 1, "vit_dim": 32,
    },
    "initializer_range": 0.2,
}  # fmt: skip
VITDET = {
    **SIZES,
    "image_size": 16,
    "patch_size": 2,
    "window_size": 3,
    "window_block_indices": [0],
    "use_relative_position_embeddings": True,
}


def pictures(side: str = "left") -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(len(side)))


def prompted(side: str) -> dict[str, Tensor]:
    points = torch.rand(3, 2, 1, 2, generator=torch.Generator().manual_seed(3)) * 16
    return {"pixel_values": pictures(side), "input_points": points}


SEGMENTERS = {
    "sam": Family("SamModel", "SamConfig", SAM, prompted, ("eager", "sdpa")),
    "sam_hq": Family("SamHQModel", "SamHQConfig", SAM, prompted, ("eager", "sdpa")),
    "vitdet": Family("VitDetModel", "VitDetConfig", VITDET, lambda side: {"pixel_values": pictures(side)}, ("eager",)),
}
