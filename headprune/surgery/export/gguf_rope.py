"""Rotary position embedding as llama.cpp's metadata says it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedConfig

from headprune.errors import UnsupportedModel

if TYPE_CHECKING:
    from gguf import GGUFWriter


def write_rope(writer: GGUFWriter, config: PreTrainedConfig, head_dim: int) -> list[str]:
    """Raises UnsupportedModel for a kind of scaling that is not known here; its outputs would differ."""
    from gguf import RopeScalingType

    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "default":
        return []
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return []
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
        return []
    raise UnsupportedModel(f"rope of type {kind!r} cannot be written to gguf here; known: default, linear, llama3.")


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by, [head_dim / 2]; transformers' modeling_rope_utils, "llama3"."""
    factor, old = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    lengths = 2 * math.pi / frequencies
    smooth = (old / lengths - low) / (high - low)
    between = 1.0 / ((1 - smooth) / factor + smooth)
    found = np.where(lengths > old / low, factor, np.where(lengths < old / high, 1.0, between))
    return found.astype(np.float32)
