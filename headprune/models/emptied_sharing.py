"""Attentions without heads in models whose last layers read the keys and values of an earlier one (Gemma 3n, Gemma 4): one that
gives them still does, one that reads them caches nothing."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from headprune.models.emptied import Emptied, length_of


class EmptiedGiver(Emptied):
    """Its keys and values are made, cached and handed on as by its family's own forward."""

    head_dim: int
    layer_idx: int
    k_proj: nn.Module
    v_proj: nn.Module | None
    k_norm: nn.Module
    v_norm: nn.Module

    def keys(self, states: Tensor, cross: bool, kwargs: dict[str, Any]) -> int:
        rotated = sys.modules[type(self).__module__].apply_rotary_pos_emb
        shape = (*states.shape[:-1], -1, self.head_dim)
        key: Tensor = self.k_proj(states).view(shape)
        value: Tensor = key if self.v_proj is None else self.v_proj(states).view(shape)
        key = rotated(self.k_norm(key), *kwargs["position_embeddings"], unsqueeze_dim=2).transpose(1, 2)
        value = self.v_norm(value).transpose(1, 2)
        if kwargs.get("past_key_values") is not None:
            key, value = kwargs["past_key_values"].update(key, value, self.layer_idx)
        kwargs["shared_kv_states"][place_of(self)] = key, value
        return length_of(key)


class EmptiedReader(Emptied):
    def keys(self, states: Tensor, cross: bool, kwargs: dict[str, Any]) -> int:
        return length_of(kwargs["shared_kv_states"][place_of(self)][0])


def place_of(module: Any) -> Any:
    """Where the model keeps the keys and values that `module` gives or reads: by kind of layer, in Gemma 3n of earlier releases by
    the number of the layer that gives them."""
    if not hasattr(module, "kv_shared_layer_index"):
        return module.layer_type
    return module.layer_idx if module.kv_shared_layer_index is None else module.kv_shared_layer_index
