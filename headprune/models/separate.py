"""Attention with one linear layer each for query, key, value and output, and key/value heads shared in groups or not:
Llama and its relatives (Mistral, Mixtral, Qwen, Gemma, Granite, SmolLM, gpt-oss, OLMo 2, Cohere), OPT and InternVL's vision
tower. In Qwen3-Next and Qwen3.5 each head's query has a gate beside it, which its output is multiplied with; in MiMo-V2 values
have a width of their own; in some layers of Gemma 4 keys and values come from one layer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.kv_sharing import gives_keys, reads_keys
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import Emptied
from headprune.models.head_counts import counts_read, follow_width, set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.own_positions import OwnPositions, remember_positions
from headprune.models.quantised import weight_shape
from headprune.models.selection import PicksHeads
from headprune.models.site import (
    AttentionSite,
    Foreign,
    HeadModules,
    HeadTensor,
    Kind,
    ProjectionHeads,
    Role,
    at,
    check_projection,
    contiguous_heads,
    heads_at,
)
from headprune.models.specialise import empty, specialise

ROLES: tuple[Role, ...] = ("query", "key", "value", "output")
INPUTS = (("q_proj", "k_proj", "v_proj"), ("Wq", "Wk", "Wv"))
OUTPUTS = ("o_proj", "out_proj", "dense", "Wo", "projection_layer")
GATES = ("gate_proj", "g_proj")
BESIDES = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "sinks", "relative_position_bias")  # what else may hold parameters
# Options of a model that makes biases of positions for all heads and hands them to its attentions as a mask (BEiT).
POSITIONS = ("use_relative_position_bias", "use_shared_relative_position_bias")


class Separate:
    """q_proj, k_proj, v_proj and o_proj (OPT: out_proj, Phi: dense, ModernBERT's decoder: Wo, InternVL: projection_layer; CTRL: Wq,
    Wk, Wv, dense) in one module that knows its head_dim, and its v_head_dim where values have another. Where v_proj is None k_proj
    gives both.

    A q_proj of twice the width holds the query and the gate of head 0, then those of head 1, ...; gates may also have a layer of
    their own (AFMoE, Laguna), with a feature for each of the head's outputs or one for all of them.

    Attention sinks and per-head q/k norms go with their heads; norms of one head_dim are shared by all and stay. A norm
    over all heads at once (OLMo 2) divides every head by a statistic of all of them: there the query and key projections
    and their norms stay whole and the heads are picked behind the norm, so that values, outputs and cache shrink exactly.
    With parameters that are none of these it is cut only where a forward pass proves it.
    """

    name = "separate"
    emptied: type = Emptied

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        others = gives_keys(module) or reads_keys(module) or hasattr(module, "relative_k_proj")
        return None if others else self.laid_out(name, module)

    def laid_out(self, name: str, module: Foreign) -> AttentionSite | None:
        output = next((output for output in OUTPUTS if hasattr(module, output)), None)
        inputs = next((parts for parts in INPUTS if hasattr(module, parts[0])), None)
        if output is None or inputs is None:
            return None
        key = inputs[1]
        keys_alone = hasattr(module, inputs[2]) and getattr(module, inputs[2]) is None  # they are the values too
        parts = (*inputs[:2], key if keys_alone else inputs[2], output)
        linear = tuple(linear_in(module, part) for part in parts)
        if not all(isinstance(at(module, path), nn.Module) for path in linear):
            return None
        if not (isinstance(getattr(module, "head_dim", None), int) and hasattr(module, "config")):
            return None
        head_dim, o = module.head_dim, at(module, linear[3])
        value_dim = getattr(module, "v_head_dim", head_dim)
        for path in linear:
            check_projection(f"{name}.{path}", at(module, path))
        queries, _, values, _ = (weight_shape(at(module, path))[0] for path in linear)
        head_map = head_map_of(module, weight_shape(o)[1], values, value_dim, name)
        # Two features in the queries for each that is read of the output: half of them are gates.
        gated = bool(head_map.query_heads) and queries == 2 * head_map.query_heads * head_dim
        widths = (head_dim * (1 + gated), head_dim, value_dim, value_dim)
        heads = dict(zip(ROLES, (head_map.query_heads, head_map.kv_heads, head_map.kv_heads, head_map.query_heads)))
        projections, extras, modules = [], [], []
        for role, path, width in zip(ROLES, linear, widths):
            norm = getattr(module, f"{role[0]}_norm", None) if role in ("query", "key") else None
            projections.append(projection(role, f"{name}.{path}", at(module, path), norm, heads[role], head_dim, width))
            modules += norms_in_a_list(f"{name}.{role[0]}_layernorm", module, role[0], heads[role], role == "key")
            extras += norm_of_each_head(f"{name}.{role[0]}_norm", norm, heads[role], head_dim, role == "key")
        if keys_alone:
            projections[2] = replace(projections[1], role="value", whole=True)
        gates = [gate for gate in GATES if gates_heads(getattr(module, gate, None), head_map, value_dim)]
        for gate in gates:
            layer: Foreign = getattr(module, gate)
            width = weight_shape(layer)[0] // max(head_map.query_heads, 1)
            projections.append(contiguous_heads("query", f"{name}.{gate}", layer, head_map.query_heads, width))
        gate_width = sum(part.features.shape[1] for part in projections if part.role == "query") - head_dim
        if isinstance(getattr(module, "sinks", None), Tensor):
            extras.append(HeadTensor(f"{name}.sinks", module, "sinks"))
        table: Foreign = getattr(module, "relative_position_bias", None)  # of a Swin window
        windowed = isinstance(getattr(table, "relative_position_bias_table", None), Tensor)
        by_prompt = hasattr(module, "internal_dim")  # SAM 2's mask decoder runs each prompt of a picture by itself
        if windowed:
            extras.append(HeadTensor(f"{name}.relative_position_bias", table, "relative_position_bias_table", dim=1))
        last = name.rpartition(".")[2]
        kind: Kind = "cross" if "cross" in last or last == "encoder_attn" else "self"
        return AttentionSite(
            name, module, module, head_map, head_dim, value_dim, weight_shape(o)[0], kind, tuple(projections), tuple(extras),
            windowed or by_prompt, head_modules=tuple(modules), proven=not unknown_parameters(module, {*parts, *gates, *BESIDES}),
            gate_width=gate_width,
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        module: Foreign = site.module
        set_head_counts(module, head_map, site.head_dim)
        follow_width(module, site, head_map)
        follow_groups(module, head_map, **counts_read(module, head_map))
        if any(getattr(module.config, bias, False) for bias in POSITIONS):
            remember_positions(module, site.head_map.query_heads, kept)
            specialise(module, OwnPositions)
        picked: tuple[tuple[Role, tuple[int, ...]], ...] = (("query", kept), ("key", site.head_map.kept_kv_heads(kept)))
        for role, heads in picked:
            if site.projection(role).whole:
                pick_behind_norm(getattr(module, f"{role[0]}_norm"), heads, site.head_dim)
        if not head_map.query_heads:
            empty(module, site.output.name.removeprefix(f"{site.name}.").partition(".")[0], self.emptied)


def linear_in(module: Foreign, part: str) -> str:
    """The path of a projection's linear layer: the part itself, or what is in it (Gemma 4's vision tower bounds what goes in and
    out, Moshi has a class of its own)."""
    held: Foreign = getattr(module, part, None)
    wraps = not hasattr(held, "weight") and isinstance(getattr(held, "linear", None), nn.Linear)
    return f"{part}.linear" if wraps else part


def unknown_parameters(module: nn.Module, known: set[str]) -> list[str]:
    """The parameters of `module` outside its parts `known`: they may belong to heads (biases of relative positions, say)."""
    return [name for name, _ in module.named_parameters() if name.partition(".")[0] not in known]


def gates_heads(layer: Foreign, head_map: HeadMap, value_dim: int) -> bool:
    """Whether `layer` gives the gates of these heads."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.shape[0] in (head_map.query_heads, head_map.query_heads * value_dim)


def projection(role: Role, name: str, module: Foreign, norm: Foreign, heads: int, head_dim: int, width: int) -> ProjectionHeads:
    """width: features of one head in the projection; head_dim: those that the norm, where there is one, sees."""
    weight = getattr(norm, "weight", None)
    if not heads or weight is None or weight.dim() != 1 or weight.numel() == head_dim:
        return contiguous_heads(role, name, module, heads, width)
    if weight.numel() != weight_shape(module)[0]:
        raise UnsupportedModel(f"{name}: its norm spans {weight.numel()} features, neither one head ({head_dim}) nor all of them.")
    whole = heads_at(role, name, module, weight_shape(module)[0] // head_dim, head_dim)
    picked = getattr(norm, "picked_heads", tuple(range(heads)))
    return ProjectionHeads(role, name, module, whole.features[list(picked)], whole=True)


def norm_of_each_head(name: str, norm: Foreign, heads: int, head_dim: int, per_kv_head: bool) -> list[HeadTensor]:
    """A norm with weights [heads, head_dim] (Cohere)."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 2:
        return []
    if weight.shape != (heads, head_dim):
        raise UnsupportedModel(f"{name} has weights {list(weight.shape)}; expected [{heads}, {head_dim}].")
    return [HeadTensor(name, norm, "weight", per_kv_head=per_kv_head)]


def norms_in_a_list(name: str, module: Foreign, letter: str, heads: int, per_kv_head: bool) -> list[HeadModules]:
    """A norm of its own for each head (StableLM)."""
    holder: Foreign = getattr(module, f"{letter}_layernorm", None)
    if not isinstance(getattr(holder, "norms", None), nn.ModuleList):
        return []
    if len(holder.norms) != heads:
        raise UnsupportedModel(f"{name} has {len(holder.norms)} norms; expected one for each of {heads} heads.")
    return [HeadModules(name, holder, "norms", per_kv_head)]


def pick_behind_norm(norm: Foreign, kept: tuple[int, ...], head_dim: int) -> None:
    earlier = getattr(norm, "picked_heads", None)
    norm.picked_heads = tuple(kept) if earlier is None else tuple(earlier[head] for head in kept)
    norm.picked_width = head_dim
    specialise(norm, PicksHeads)


register_adapter(Separate())
