"""Attention of vision models whose query, key and value share one linear layer `qkv`: the towers of Qwen-VL and its relatives
(GLM-V, ERNIE-VL, EXAONE, dots), which take all pictures of a batch as one packed sequence [tokens, features]; the windows of
Florence-2; BLIP, BLIP-2 and InstructBLIP."""

from __future__ import annotations

import inspect

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.behaviour import original_class
from headprune.models.emptied import EmptiedAlone
from headprune.models.fused import Fused
from headprune.models.fused_layout import blocks
from headprune.models.layer_config import follow_groups
from headprune.models.own_head_dim import OwnHeadDim
from headprune.models.separate import unknown_parameters
from headprune.models.site import AttentionSite, Foreign
from headprune.models.specialise import specialise
from headprune.models.window_forward import EmptiedWindows, OwnWindows

FLORENCE = ("num_heads", "window_size", "scale", "dim")
NORMS = {"q_norm", "k_norm"}


def takes_packed(module: Foreign) -> bool:
    """Runs on tokens [tokens, features] and where each picture starts, with no parameters but the projections and norms that all
    heads share."""
    kind: Foreign = original_class(module)
    takes = inspect.signature(kind.forward).parameters
    if "cu_seqlens" not in takes or not hasattr(module, "config") or unknown_parameters(module, {"qkv", "proj", *NORMS}):
        return False
    norms = [parameter for name in NORMS if hasattr(module, name) for parameter in getattr(module, name).parameters()]
    return all(parameter.shape == (module.head_dim,) for parameter in norms)


def kv_heads(module: Foreign) -> int:
    """As many as query heads, unless the module (EXAONE 4.5) says that they are shared."""
    many: int = getattr(module, "num_key_value_heads", module.num_heads)
    return many


def packed_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    follow_groups(site.module, head_map)
    module: Foreign = site.module
    if hasattr(module, "q_dim"):
        module.q_dim, module.kv_dim = head_map.query_heads * site.head_dim, head_map.kv_heads * site.head_dim


def takes_windows(module: Foreign) -> bool:
    """Cuts the picture into windows itself, with no parameters but the projections."""
    kind: Foreign = original_class(module)
    takes = [*inspect.signature(kind.forward).parameters] == ["self", "hidden_states"]
    return takes and all(hasattr(module, part) for part in FLORENCE) and not unknown_parameters(module, {"qkv", "proj"})


def windows_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    specialise(site.module, OwnWindows)


def blip_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    specialise(site.module, OwnHeadDim)


register_adapter(
    Fused(
        "packed_vision", "qkv", "proj", "head_dim", takes_packed, lambda module: blocks, kv_heads=kv_heads, after=packed_after,
        emptied=EmptiedAlone,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "florence_vision", "qkv", "proj", "scale", takes_windows, lambda module: blocks, after=windows_after,
        emptied=EmptiedWindows, windowed=True,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "blip_vision", "qkv", "projection", "head_dim", lambda module: not unknown_parameters(module, {"qkv", "projection"}),
        lambda module: blocks, after=blip_after,
    )
)  # fmt: skip
