"""Where query, key and value heads lie in one linear layer that holds them all."""

from __future__ import annotations

import torch

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.site import Foreign, ProjectionHeads, Role, check_filled, check_projection, heads_at


def blocks(name: str, module: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
    """All query heads, then all key heads, then all value heads."""
    q, kv = head_map.query_heads, head_map.kv_heads
    starts: tuple[tuple[Role, int, int], ...] = (("query", q, 0), ("key", kv, q * head_dim), ("value", kv, (q + kv) * head_dim))
    return filled(*(heads_at(role, name, module, heads, head_dim, start) for role, heads, start in starts))


def key_value_blocks(name: str, module: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
    """All key heads, then all value heads."""
    heads = head_map.kv_heads
    starts: tuple[tuple[Role, int], ...] = (("key", 0), ("value", heads * head_dim))
    return filled(*(heads_at(role, name, module, heads, head_dim, start) for role, start in starts))


def per_head(name: str, module: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
    """Query, key and value of head 0, then of head 1, ..."""
    heads = head_map.query_heads
    roles: tuple[Role, ...] = ("query", "key", "value")
    places = ((role, index * head_dim) for index, role in enumerate(roles))
    return filled(*(heads_at(role, name, module, heads, head_dim, start, 3 * head_dim) for role, start in places))


def per_group(name: str, module: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
    """The query heads of group 0, its key head, its value head, then group 1, ..."""
    check_projection(name, module)
    query, key = places_in_groups(head_map)
    places: dict[Role, list[int]] = {"query": query, "key": key, "value": [place + 1 for place in key]}
    features = torch.arange((head_map.query_heads + 2 * head_map.kv_heads) * head_dim, device="cpu").view(-1, head_dim)
    return filled(*(ProjectionHeads(role, name, module, features[list(found)]) for role, found in places.items()))


def quarters(name: str, module: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
    """All queries, all values and all keys, each in four equal parts: the first part of each, then the second, ..."""
    if head_dim % 4:
        raise UnsupportedModel(f"{name} has heads of {head_dim} features; expected a multiple of 4, as they lie in four blocks.")
    roles: tuple[Role, ...] = ("query", "value", "key")
    heads, part = head_map.query_heads, head_map.query_heads * head_dim // 4
    features = torch.arange(heads * head_dim, device="cpu").view(heads, head_dim)
    features = features + features // max(part, 1) * 2 * part
    check_projection(name, module)
    query, value, key = (ProjectionHeads(role, name, module, features + index * part) for index, role in enumerate(roles))
    return filled(query, key, value)


def places_in_groups(head_map: HeadMap) -> tuple[list[int], list[int]]:
    """For `per_group`, in heads: the place of each query head, and of each key head (its value head follows)."""
    query = [head + 2 * kv for head, kv in enumerate(head_map.kv_of_query)]
    return query, [end + 2 * group for group, end in enumerate(head_map.group_offsets[1:])]


def filled(*projections: ProjectionHeads) -> tuple[ProjectionHeads, ...]:
    check_filled(*projections)
    return projections
