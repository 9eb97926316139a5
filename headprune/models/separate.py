"""Attention with separate query, key and value projections and one key/value head per query head.

One table for BERT, RoBERTa and ELECTRA, DistilBERT, DeBERTa, BART, Whisper, CLIP, OPT, ViT and what is built like them: only
the names differ, and which attributes the forward pass reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.site import AttentionSite, ProjectionHeads, Role, contiguous_heads

ROLES: tuple[Role, ...] = ("query", "key", "value", "output")
HEAD_DIM = ("head_dim", "attention_head_size")  # where modules keep it
HEAD_COUNTS = ("num_heads", "n_heads", "num_attention_heads")
WIDTHS = ("all_head_size",)  # head count times head_dim
GROUPED = ("num_key_value_groups", "num_key_value_heads", "num_kv_heads")  # such modules are for other adapters
CROSS_NAMES = ("cross", "encoder_attn", "encdec", "multihead_attn")


@dataclass(frozen=True)
class Layout:
    """Where one kind of module keeps its projections, as paths below it, in the order of ROLES.

    inner: path of the module that computes the attention ("" = the module itself). more: further projections with a slice per
    head, as (role, path), left out where a module has none.
    """

    projections: tuple[str, str, str, str]
    inner: str = ""
    more: tuple[tuple[Role, str], ...] = ()


LAYOUTS = (
    Layout(("self.query", "self.key", "self.value", "output.dense"), "self"),
    # DeBERTa: positions are projected with weights of their own, read by the query and the key of the same head.
    Layout(
        ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
        "self",
        (("key", "self.pos_key_proj"), ("query", "self.pos_query_proj")),
    ),
    Layout(("q_lin", "k_lin", "v_lin", "out_lin")),
    Layout(("q_proj", "k_proj", "v_proj", "out_proj")),
    Layout(("q_proj", "k_proj", "v_proj", "o_proj")),
)


class Separate:
    name = "separate"

    def site(self, name: str, module: nn.Module) -> AttentionSite | None:
        layout = next((layout for layout in LAYOUTS if all(at(module, path) is not None for path in layout.projections)), None)
        if layout is None:
            return None
        dispatcher = at(module, layout.inner)
        head_dim = next((getattr(dispatcher, known) for known in HEAD_DIM if hasattr(dispatcher, known)), None)
        if not isinstance(head_dim, int) or any(hasattr(dispatcher, known) for known in GROUPED):
            return None
        site = separate_site(name, module, dispatcher, layout.projections, layout.more, head_dim)
        return site if all_weights_known(site) else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap) -> None:
        set_counts(site.dispatcher, head_map.query_heads, site.head_dim)


def separate_site(
    name: str,
    module: nn.Module,
    dispatcher: nn.Module,
    paths: tuple[str, str, str, str],
    more: tuple[tuple[Role, str], ...],
    head_dim: int,
) -> AttentionSite:
    """The site of projections at `paths` below `module`, whose heads lie one after another."""
    query, output = at(module, paths[0]), at(module, paths[3])
    head_map = head_map_of(dispatcher, query.weight.shape[0], at(module, paths[1]).weight.shape[0], head_dim, name)
    parts = [*zip(ROLES, paths), *((role, path) for role, path in more if at(module, path) is not None)]
    projections = tuple(
        contiguous_heads(
            role,
            f"{name}.{path}",
            at(module, path),
            head_map.kv_heads if role in ("key", "value") else head_map.query_heads,
            head_dim,
        )
        for role, path in parts
    )
    kind = "cross" if is_cross(name, dispatcher) else "self"
    return AttentionSite(name, module, dispatcher, head_map, head_dim, head_dim, output.weight.shape[0], kind, projections)


def is_cross(name: str, dispatcher: nn.Module) -> bool:
    """Nothing else in a layer tells: the same module attends to its own input or to an encoder's output."""
    own_name = f"{name.rpartition('.')[2]} {type(dispatcher).__name__}".lower()
    return any(part in own_name for part in CROSS_NAMES)


def all_weights_known(site: AttentionSite) -> bool:
    """False where the attention has weights that no projection here knows, and that could belong to single heads: all that
    are not as long as one head (a norm of query or key that all heads share)."""
    known = {id(parameter) for projection in site.projections for parameter in projection.module.parameters()}
    return all(shared_by_heads(parameter, site.head_dim) for parameter in site.dispatcher.parameters() if id(parameter) not in known)


def shared_by_heads(parameter: Tensor, head_dim: int) -> bool:
    return tuple(parameter.shape) == (head_dim,)


def set_counts(dispatcher: nn.Module, heads: int, head_dim: int) -> None:
    """Sets the attributes that hold a number of heads or their features, where `dispatcher` has them."""
    for name in HEAD_COUNTS:
        if isinstance(getattr(dispatcher, name, None), int):
            setattr(dispatcher, name, heads)
    for name in WIDTHS:
        if isinstance(getattr(dispatcher, name, None), int):
            setattr(dispatcher, name, heads * head_dim)


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The part of `module` at `path` ("" = itself), None where there is none."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), module) if path else module


register_adapter(Separate())
