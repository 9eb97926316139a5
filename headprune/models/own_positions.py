"""Position biases that a model makes for all heads at once and hands to every layer (ALiBi in BLOOM, Falcon and MPT, tables of
relative positions in BEiT, of words on a page in LayoutLM v2 and v3): a pruned layer picks those of its own heads. They stay those
of the original heads, whatever was cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headprune.models.behaviour import Behaviour
from headprune.models.selection import select_heads

BIASES = ("alibi", "position_bias", "attention_mask", "relative_position_bias", "rel_pos", "rel_2d_pos")


class OwnPositions(Behaviour):
    """Forward of an attention module whose `position_heads` (of `all_position_heads`) are left."""

    position_heads: tuple[int, ...]
    all_position_heads: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in BIASES:
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = own_part(kwargs[name], self.position_heads, self.all_position_heads)
        return super().forward(*args, **kwargs)


class PositionsThird(OwnPositions):
    """MPNet hands them over as its third argument."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, attention_mask, position_bias=position_bias, **kwargs)


class GroupedFalcon(OwnPositions):
    """Falcon with groups, equal or ragged. The stock module too hands the cache one key/value head per query head.

    query_places, key_places: where each query head, and the key that it reads, lie in the fused projection, in heads; the
    value follows its key.
    """

    head_dim: int
    query_places: tuple[int, ...]
    key_places: tuple[int, ...]

    def _split_heads(self, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = fused_qkv.unflatten(-1, (-1, self.head_dim))
        query, key = select_heads(heads, self.query_places, 2), select_heads(heads, self.key_places, 2)
        return query, key, select_heads(heads, [place + 1 for place in self.key_places], 2)


def own_part(bias: Tensor, heads: tuple[int, ...], all_heads: int) -> Tensor:
    """The part of `bias` that belongs to `heads`: [batch * all_heads, 1, kv_len] or [batch, all_heads, query_len, kv_len];
    a bias that is the same for all heads as it is."""
    if bias.dim() == 3:
        return select_heads(bias.unflatten(0, (-1, all_heads)), heads, 1).flatten(0, 1)
    if bias.dim() == 4 and bias.shape[1] == all_heads > 1:
        return select_heads(bias, heads, 1)
    return bias


def remember_positions(module: Any, heads_before: int, kept: tuple[int, ...]) -> None:
    """Sets `position_heads` and `all_position_heads` after a cut of `module`, which may have been cut before."""
    earlier = getattr(module, "position_heads", tuple(range(heads_before)))
    module.all_position_heads = getattr(module, "all_position_heads", heads_before)
    module.position_heads = tuple(earlier[head] for head in kept)
