"""What `load` hands on to transformers, checked before a file is read: there a mistake reads like a damaged folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprune.errors import InvalidInput, unknown_name
from headprune.models.placement import refuse_absent

NAMED = {"revision": "it with the name, as owner/name@revision", "subfolder": "the path of that folder"}
CHECKED = {*NAMED, "attn_implementation", "dtype", "torch_dtype", "device_map"}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_load_options(options: Mapping[str, Any]) -> None:
    """InvalidInput where the attention, the dtype or the place that they name is none, or the name alone says what they say."""
    for name, way_out in NAMED.items():
        if options.get(name):
            raise InvalidInput(f"{name} is {options[name]!r:.80}; leave it out and give {way_out}.")
    check_attention(options.get("attn_implementation"))
    for name in ("dtype", "torch_dtype"):
        check_dtype(name, options.get(name))
    check_device_map(options.get("device_map"))


def check_attention(chosen: Any) -> None:
    """InvalidInput where `attn_implementation` is none that transformers has; of its hub ("owner/name") it finds them itself."""
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    for name in chosen.values() if isinstance(chosen, dict) else [chosen]:
        if name is not None and name not in known and "/" not in str(name):
            raise unknown_name("attn_implementation", name, known)


def check_dtype(name: str, chosen: Any) -> None:
    """InvalidInput where `chosen` is no dtype for from_pretrained: one of torch's or its name, "auto", or one for each part."""
    for one in chosen.values() if isinstance(chosen, Mapping) else [chosen]:
        found = getattr(torch, one, None) if isinstance(one, str) else one
        if not (one is None or one == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point)):
            raise InvalidInput(f"{name} is {one!r:.80}; expected a floating-point torch.dtype, its name ('bfloat16') or 'auto'.")


def check_device_map(chosen: Any) -> None:
    """InvalidInput where `chosen` is no device_map for from_pretrained, or names a GPU that is not here."""
    if chosen == {}:
        raise InvalidInput("device_map is {}; expected a device for each module, or leave it out.")
    for one in chosen.values() if isinstance(chosen, Mapping) else [chosen]:
        if one is None or one in DEVICE_MAPS or (one == "disk" and one is not chosen):
            continue
        try:
            device = torch.device(one)
        except (RuntimeError, TypeError):
            raise InvalidInput(
                f"device_map is {one!r:.80}; expected a device ('cpu', 'cuda:0'), {', '.join(map(repr, DEVICE_MAPS))}, or a device "
                "for each module."
            ) from None
        refuse_absent(device)
