"""Encoders whose projections have names of their own: BERT (RoBERTa, ELECTRA and their like), DeBERTa, DistilBERT, ALBERT, the
Q-Former of BLIP-2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import Emptied, EmptiedAlbert
from headprune.models.head_counts import set_head_counts
from headprune.models.site import AttentionSite, Foreign, Kind, Role, contiguous_heads
from headprune.models.specialise import empty

ROLES: tuple[Role, ...] = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Named:
    """Paths below the attention module; there is one key/value head per query head.

    projections: in the order of ROLES. inner: the part that computes the attention, where the output projection stands beside
    it ("" = the module itself). more: further projections with a slice per head, which a module may lack. emptied: what becomes of
    an attention without heads. head_dim: of that inner part, or None where it is of another kind. windowed: as in AttentionSite.
    beside: what else must stand there.
    """

    name: str
    projections: tuple[str, str, str, str]
    inner: str = ""
    more: tuple[tuple[Role, str], ...] = ()
    emptied: type[Emptied] = Emptied
    head_dim: Callable[[Foreign], int | None] = lambda inner: getattr(inner, "attention_head_size", None)
    windowed: bool = False
    beside: tuple[str, ...] = ()

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        parts = [*zip(ROLES, self.projections), *((role, path) for role, path in self.more if at(module, path) is not None)]
        dispatcher = at(module, self.inner) if self.inner else module
        # A layer has a feed-forward, whose output may be called as an attention's (TVP).
        paths = [*(path for _, path in parts), *self.beside]
        if hasattr(module, "intermediate") or not all(isinstance(at(module, path), nn.Module) for path in paths):
            return None
        head_dim, output = self.head_dim(dispatcher), at(module, self.projections[3])
        if head_dim is None:
            return None
        features = at(module, self.projections[0]).weight.shape[0]
        head_map = head_map_of(dispatcher, features, features, head_dim, name)
        heads = head_map.query_heads
        projections = tuple(contiguous_heads(role, f"{name}.{path}", at(module, path), heads, head_dim) for role, path in parts)
        kind: Kind = "cross" if "Cross" in type(dispatcher).__name__ or "cross" in name.rpartition(".")[2] else "self"
        return AttentionSite(
            name, module, dispatcher, head_map, head_dim, head_dim, output.weight.shape[0], kind, projections,
            windowed=self.windowed,
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.dispatcher, head_map, site.head_dim)
        if not head_map.query_heads:
            empty(site.dispatcher, None if self.inner else self.projections[3], self.emptied)


def at(module: Foreign, path: str) -> Foreign:
    """What stands at `path` below `module`; None where there is nothing."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), module)


register_adapter(Named("bert", ("self.query", "self.key", "self.value", "output.dense"), "self"))
register_adapter(
    Named(
        "qformer", ("attention.query", "attention.key", "attention.value", "output.dense"), "attention",
        beside=("output.LayerNorm",),
    )
)  # fmt: skip
register_adapter(
    Named(
        "deberta", ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"), "self",
        # Positions have projections of their own, which the query and the key of the same head read.
        (("key", "self.pos_key_proj"), ("query", "self.pos_query_proj")),
    )
)  # fmt: skip
register_adapter(Named("distilbert", ("q_lin", "k_lin", "v_lin", "out_lin")))
# One module is several layers: what it loses they all lose.
register_adapter(Named("albert", ("query", "key", "value", "dense"), emptied=EmptiedAlbert))
