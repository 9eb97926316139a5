"""What one pruned layer reads of its model's config, and how stock attention functions run a ragged one.

Attention modules ask `self.config` at each call which attention function to use, and some (Phi-3) how many heads there
are. A copy of the config would no longer follow `model.set_attn_implementation`, so a pruned layer gets a view of it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprune.attention_interface import NAME, headprune_attention
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.models.paged import with_cached
from headprune.models.site import Foreign
from headprune.ops.sdpa import repeated_heads

EXPANDED = "headprune_expanded"


class LayerConfig:
    """`shared`, the model's config, with some values of this layer's own; all else is read from (and written to) `shared`."""

    def __init__(self, shared: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(shared=shared, own=own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def own_config(module: Foreign, head_map: HeadMap, **own: Any) -> None:
    """Gives `module` a config view with `own` values, and where groups are ragged with an attention function that expands
    keys and values for those that know equal groups alone; the plain config where neither is needed."""
    shared = getattr(module.config, "shared", module.config)
    if not head_map.is_uniform:
        own["_attn_implementation"] = EXPANDED
    module.config = LayerConfig(shared, own) if own else shared


def follow_groups(module: Foreign, head_map: HeadMap, **own: Any) -> None:
    """`own_config`, and the group size that stock attention functions repeat key/value heads by."""
    module.num_key_value_groups = head_map.group_sizes[0] if head_map.kv_heads and head_map.is_uniform else 1
    own_config(module, head_map, **own)


def expanded_attention(
    module: Foreign, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function on one key/value head per query head; under "headprune" nothing is expanded."""
    implementation = module.config.shared._attn_implementation
    if implementation == NAME:
        return headprune_attention(module, query, key, value, attention_mask, **arguments)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    functions: Any = ALL_ATTENTION_FUNCTIONS  # its types do not know that None may be given
    # What is eager over a paged cache (continuous batching) is eager behind it.
    function = functions.get_interface(implementation.removeprefix("paged|"), eager)
    if function is None:
        raise InvalidInput(f"{type(module).__name__} has no {implementation} attention for ragged groups; use {NAME!r}.")
    key, value = with_cached(module, key, value, arguments)
    key, value = repeated_heads(key, module.head_map), repeated_heads(value, module.head_map)
    output, weights = function(module, query, key, value, attention_mask, **arguments)
    return output, weights


AttentionInterface.register(EXPANDED, expanded_attention)
