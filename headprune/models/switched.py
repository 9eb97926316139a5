"""BigBird's attention looks at blocks of a long text; where a text is short, another module takes its place for good."""

from __future__ import annotations

from typing import Any

from headprune.models.behaviour import Behaviour, behave

HEADS = ("num_attention_heads", "all_head_size", "head_map", "kv_of_query", "headprune_kv_heads", "headprune_output")


class SwitchesAttention(Behaviour):
    """What takes the place of an attention that has lost heads has as many."""

    def set_attention_type(self, *args: Any, **kwargs: Any) -> None:
        stock: Any = super()
        outer: Any = self
        before = outer.self
        stock.set_attention_type(*args, **kwargs)
        if outer.self is before:
            return
        for name in HEADS:
            if name in vars(before):
                setattr(outer.self, name, vars(before)[name])
        behaviour = vars(type(before)).get("headprune_behaviour")
        if behaviour is not None:
            behave(outer.self, behaviour)
