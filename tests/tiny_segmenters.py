"""Tiny random SAM, SAM-HQ, SAM 2 and ViTDet: vision attentions over windows of pictures; they give no loss."""

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


def pictures(side: str = "left", size: int = 16) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(len(side)))


def prompted(side: str) -> dict[str, Tensor]:
    points = torch.rand(3, 2, 1, 2, generator=torch.Generator().manual_seed(3)) * 16
    return {"pixel_values": pictures(side), "input_points": points}


def prompted_large(side: str) -> dict[str, Tensor]:
    return {**prompted(side), "pixel_values": pictures(side, 32)}


HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 2, "image_size": [32, 32],
    "patch_kernel_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "blocks_per_stage": [1, 1, 2],
    "embed_dim_per_stage": [16, 32, 64], "num_attention_heads_per_stage": [2, 4, 4], "window_size_per_stage": [4, 4, 2],
    "global_attention_blocks": [3], "num_query_pool_stages": 2, "window_positional_embedding_background_size": [4, 4],
    "initializer_range": 0.2,
}  # fmt: skip
SAM2 = {
    "vision_config": {
        "backbone_config": HIERA, "backbone_channel_list": [64, 32, 16], "fpn_hidden_size": 16, "num_feature_levels": 3,
        "fpn_top_down_levels": [1, 2], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": SAM["mask_decoder_config"], "initializer_range": 0.2,
}  # fmt: skip
SEGGPT = {
    **PICTURE, "image_size": [16, 8], "merge_index": 0, "intermediate_hidden_state_indices": [0, 1], "decoder_hidden_size": 8,
    "pretrain_image_size": 8,
}  # fmt: skip


def shown(side: str) -> dict[str, Tensor]:
    """Pictures, and beside each another one with what is to be found in it."""
    return {
        name: torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(len(side) + index))
        for index, name in enumerate(PROMPTED)
    }


PROMPTED = ("pixel_values", "prompt_pixel_values", "prompt_masks")
SEGMENTERS = {
    "seggpt": Family("SegGptForImageSegmentation", "SegGptConfig", SEGGPT, shown, ("eager",)),
    "sam": Family("SamModel", "SamConfig", SAM, prompted, ("eager", "sdpa")),
    "sam_hq": Family("SamHQModel", "SamHQConfig", SAM, prompted, ("eager", "sdpa")),
    "sam2": Family("Sam2Model", "Sam2Config", SAM2, prompted_large, ("eager", "sdpa", "headprune")),
    "vitdet": Family("VitDetModel", "VitDetConfig", VITDET, lambda side: {"pixel_values": pictures(side)}, ("eager",)),
}
