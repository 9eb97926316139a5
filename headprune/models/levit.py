"""LeViT: queries, keys and values of one head after another in a layer without bias, and a batch norm behind each layer; where the
picture is made smaller the queries have a layer of their own. What heads give goes through an activation that leaves 0 as it is.
"""

from __future__ import annotations

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import EmptiedAlone
from headprune.models.head_counts import set_head_counts
from headprune.models.levit_forward import EmptiedSmaller
from headprune.models.site import (
    AttentionSite,
    Foreign,
    HeadTensor,
    ProjectionHeads,
    Role,
    check_filled,
    check_projection,
    contiguous_heads,
    heads_at,
)
from headprune.models.specialise import empty

Parts = tuple[tuple[str, tuple[Role, ...]], ...]
SAME: Parts = (("queries_keys_values", ("query", "key", "value")),)
SMALLER: Parts = (("queries", ("query",)), ("keys_values", ("key", "value")))
NORM = ("weight", "bias", "running_mean", "running_var")


class Levit:
    name = "levit"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        parts = parts_of(module)
        if parts is None:
            return None
        key_dim, output = module.key_dim, module.projection.linear
        check_projection(f"{name}.projection.linear", output)
        value_dim = round(module.attention_ratio * key_dim)
        head_map = head_map_of(module, output.in_features, output.in_features, value_dim, name)
        heads, projections, extras = head_map.query_heads, [], [HeadTensor(f"{name}.attention_biases", module, "attention_biases")]
        for part, roles in parts:
            layer: Foreign = getattr(module, part)
            width = {"query": key_dim, "key": key_dim, "value": value_dim}
            of_head = sum(width[role] for role in roles)
            inside: list[ProjectionHeads] = []
            for role in roles:
                start = sum(found.features.shape[1] for found in inside)
                inside.append(heads_at(role, f"{name}.{part}.linear", layer.linear, heads, width[role], start, of_head))
            check_filled(*inside)
            projections += inside
            extras += [HeadTensor(f"{name}.{part}.batch_norm", layer.batch_norm, of, width=of_head) for of in NORM]
        projections.append(contiguous_heads("output", f"{name}.projection.linear", output, heads, value_dim))
        return AttentionSite(
            name, module, module, head_map, key_dim, value_dim, output.out_features, "self", tuple(projections), tuple(extras)
        )

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        module: Foreign = site.module
        set_head_counts(module, head_map, site.head_dim)
        module.out_dim_projection = head_map.query_heads * site.value_dim
        module.attention_bias_cache = {}
        for part, _ in parts_of(module) or ():
            layer: Foreign = getattr(module, part)
            layer.batch_norm.num_features = layer.linear.out_features
        if not head_map.query_heads:
            empty(module, "projection", EmptiedSmaller if hasattr(module, "queries") else EmptiedAlone)


def parts_of(module: Foreign) -> Parts | None:
    """The layers before the heads and what each holds; None where it is no attention of LeViT's."""
    found = next((parts for parts in (SAME, SMALLER) if all(is_normed(getattr(module, part, None)) for part, _ in parts)), None)
    known = "attention_biases" in module._parameters and is_normed(getattr(module, "projection", None))
    return found if known else None


def is_normed(layer: Foreign) -> bool:
    return isinstance(getattr(layer, "linear", None), nn.Linear) and isinstance(getattr(layer, "batch_norm", None), nn.BatchNorm1d)


register_adapter(Levit())
