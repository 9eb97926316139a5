"""Which attentions of a model share keys and values: the last layers of Gemma 3n and Gemma 4 (`num_kv_shared_layers`) read those
of an earlier layer of the same kind."""

from __future__ import annotations

from typing import Any

ARGUMENT = "shared_kv_states"  # of their forward: what one leaves there others find


def gives_keys(module: Any) -> bool:
    """Whether later layers read what `module` makes, which it leaves outside of its result."""
    config = getattr(module, "config", None)
    return bool(getattr(module, "store_full_length_kv", False) and getattr(config, "num_kv_shared_layers", 0))


def shares_keys(config: Any) -> bool:
    """Whether a model of this config has such layers; it may be one with a vision tower beside its text."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "num_kv_shared_layers", 0))


def reads_keys(module: Any) -> bool:
    return bool(getattr(module, "is_kv_shared_layer", False))
