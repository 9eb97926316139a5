"""The smallest input that a transformers model runs on, for checks by a forward pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 6
FRAMES = 64
TOWERS = ("vision_config", "image_config", "encoder")  # what reads pictures; the last in a vision encoder-decoder (TrOCR, Donut)
SIDE = 64  # of a picture, for models that take any size (SegFormer, RT-DETR)


def tiny_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Arguments of `model.forward`: two rows of tokens (one of them padded), one picture or film (beside tokens one for each
    row), one sound or spectrogram, as the model takes them; None where its config does not tell."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return picture_for_patches(model)
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    vocabulary: Any = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None)
    if "input_ids" in taken and main in ("input_ids", "pixel_values", "inputs") and isinstance(vocabulary, int):
        inputs |= tokens(vocabulary, enough_tokens(config))
    if "grid_thw" in taken or "image_grid_thw" in taken:
        inputs |= packed_picture(model, taken, inputs.get("input_ids"))
    elif "pixel_values" in taken:
        alone = main == "pixel_values" and not inputs
        tower = next((getattr(config, part) for part in TOWERS if hasattr(config, part)), config)
        inputs |= pixels(tower, rows_of(inputs), SIDE if alone else None)
        inputs |= with_places(config, inputs)
        inputs |= prompt_beside(taken, inputs)
    if "bbox" in taken and "input_ids" in inputs:
        inputs |= page(config, taken, inputs["input_ids"])
    if "qformer_input_ids" in taken:
        inputs["qformer_input_ids"] = tokens(config.qformer_config.vocab_size)["input_ids"][:1]
    if "visual_feats" in taken and hasattr(config, "visual_feat_dim"):  # of what LXMERT's detector found
        inputs |= {"visual_feats": torch.ones(2, 3, config.visual_feat_dim), "visual_pos": torch.ones(2, 3, config.visual_pos_dim)}
    if "input_features" in taken and main == "input_features":
        inputs |= spectrogram(model, config)
    if "input_values" in taken and main == "input_values":
        inputs |= sound(config)
    if not inputs:
        return None
    decodes = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken
    if decodes and isinstance(vocabulary, int):
        inputs["decoder_input_ids"] = tokens(vocabulary)["input_ids"][: rows_of(inputs)]
    place = next(model.parameters())
    device = "cpu" if place.is_meta else place.device
    return {name: value.to(device, place.dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def picture_for_patches(model: nn.Module) -> dict[str, Tensor] | None:
    """timm's vision transformers keep the size of their pictures with the patch embedding."""
    patches: Any = getattr(model, "patch_embed", None)
    size, place = getattr(patches, "img_size", None), next(model.parameters(), None)
    if (
        size is None
        or not isinstance(getattr(patches, "proj", None), nn.Conv2d)
        or "x" not in inspect.signature(model.forward).parameters
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(1, patches.proj.in_channels, *size, generator=generator).to(place)}


def rows_of(inputs: dict[str, Tensor]) -> int:
    return next(iter(inputs.values())).shape[0] if inputs else 1


def enough_tokens(config: Any) -> int:
    """BigBird gives up its sparse attention for good where a text is no longer than what it would see of it."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return TOKENS
    seen: int = (5 + 2 * config.num_random_blocks) * config.block_size
    return min(seen + 1, int(config.max_position_embeddings))


def tokens(vocabulary: int, length: int = TOKENS) -> dict[str, Tensor]:
    ids = 1 + torch.arange(2 * length).view(2, length) * 7919 % max(vocabulary - 1, 1)
    mask = torch.ones_like(ids)
    mask[1, :1] = 0
    return {"input_ids": ids.clamp(max=vocabulary - 1), "attention_mask": mask}


def pixels(config: Any, rows: int, otherwise: int | None) -> dict[str, Tensor]:
    """otherwise: the side of a picture where `config` does not say."""
    size = getattr(config, "image_size", None) or getattr(getattr(config, "backbone_config", None), "image_size", None) or otherwise
    if size is None:
        return {}
    height, width = (size, size) if isinstance(size, int) else size
    shape: tuple[int, ...] = (getattr(config, "num_channels", 3), height, width)
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):  # a film
        shape = (frames, *shape)
    return {"pixel_values": torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).repeat(rows, *[1] * len(shape))}


def page(config: Any, taken: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """Where each word stands on its page (left, top, right, bottom), and the page's picture as LayoutLMv2 takes it."""
    words = torch.arange(ids.numel()).view(ids.shape)
    end = min(1000, int(getattr(config, "max_2d_position_embeddings", 1000)) - 1)
    left, top = words * 7919 % (end // 2), words * 104729 % (end // 2)
    boxes = {"bbox": torch.stack([left, top, left + end // 8, top + end // 4], dim=-1)}
    if "image" not in taken:
        return boxes
    generator = torch.Generator().manual_seed(0)
    return boxes | {"image": torch.rand(1, 3, 224, 224, generator=generator).repeat(len(ids), 1, 1, 1)}


def prompt_beside(taken: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SegGPT's picture, which is one half of what its size says, with a prompt and the prompt's mask, which it shows above it."""
    if "prompt_pixel_values" not in taken or "prompt_masks" not in taken or "pixel_values" not in inputs:
        return {}
    prompt, picture = inputs["pixel_values"].chunk(2, dim=2)
    return {"pixel_values": picture, "prompt_pixel_values": prompt, "prompt_masks": prompt.flip(3)}


def with_places(config: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokens with those of one picture before them, in the first row, where a model puts few (BLIP-2): the hundreds of others
    would take their time."""
    picture_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    many = getattr(config, "num_query_tokens", None)
    if not isinstance(picture_token, int) or not isinstance(many, int) or not {"input_ids", "pixel_values"} <= set(inputs):
        return {}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = ids.new_zeros(len(ids), many)
    places[0] = picture_token
    return {
        "input_ids": torch.cat([places, ids.masked_fill(ids == picture_token, 0)], dim=1),
        "attention_mask": torch.cat([(places != 0).to(mask.dtype), mask], dim=1),
    }


def packed_picture(model: nn.Module, taken: Mapping[str, Any], ids: Tensor | None) -> dict[str, Tensor]:
    """The patches of one picture, [patches, features of a patch], as the vision towers of Qwen-VL and its relatives take them,
    and its places in the first row of `ids`."""
    config: Any = model.config
    tower = getattr(config, "vision_config", config)
    embedding = next((module for name, module in model.named_modules() if name.endswith("patch_embed.proj")), None)
    picture_token, merged = getattr(config, "image_token_id", None), getattr(tower, "spatial_merge_size", None)
    weight: Any = getattr(embedding, "weight", None)
    if weight is None or not isinstance(merged, int):
        return {}
    side, generator = 2 * merged, torch.Generator().manual_seed(0)
    patches, grid = torch.randn(side**2, weight[0].numel(), generator=generator), torch.tensor([[1, side, side]])
    if "grid_thw" in taken:
        return {"hidden_states": patches, "grid_thw": grid}
    if ids is None or not isinstance(picture_token, int):
        return {}
    ids = ids.masked_fill(ids == picture_token, 0)
    ids[0, 1:5] = picture_token
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid}
    return inputs | ({"mm_token_type_ids": (ids == picture_token).int()} if "mm_token_type_ids" in taken else {})


def spectrogram(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """[1, bins, frames] where the model's first convolution runs along the frames (Whisper), else [1, frames, bins]."""
    parts = (config, getattr(config, "encoder_config", None))
    part = next((part for part in parts if bins_of(part) is not None), None)
    if part is None:
        return {}
    bins, generator = bins_of(part), torch.Generator().manual_seed(0)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv1d)), None)
    across = hasattr(part, "num_mel_bins") and first is not None and first.in_channels == bins
    shape = (1, bins, 2 * getattr(part, "max_source_positions", FRAMES // 2)) if across else (1, FRAMES, bins)
    return {"input_features": torch.randn(shape, generator=generator)}


def bins_of(config: Any) -> Any:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def sound(config: Any) -> dict[str, Tensor]:
    """[1, samples] (wav2vec 2.0, HuBERT, Moonshine), or the spectrogram [1, frames, bins] of a transformer over its patches."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return {"input_values": torch.randn(1, config.max_length, config.num_mel_bins, generator=generator)}
    if hasattr(config, "audio_channels"):
        return {}  # a codec
    stride = math.prod(getattr(config, "conv_stride", (320,)))
    return {"input_values": torch.randn(1, 2 * TOKENS * stride + 400, generator=generator)}


def without_padding(output: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`output` with what stands at padded tokens set to 0: attention functions differ in what they give where all is padding."""
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None or output.shape[:2] != mask.shape:
        return output
    return output.masked_fill((mask == 0).to(output.device).view(*mask.shape, *[1] * (output.dim() - 2)), 0)
