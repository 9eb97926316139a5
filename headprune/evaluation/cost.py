"""What a model costs by count: parameters, bytes, FLOPs, key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headprune.evaluation.data import placed
from headprune.evaluation.token_counts import TokenCount
from headprune.models.caching import caching_sites
from headprune.models.quantised import parts_of
from headprune.models.site import AttentionSite
from headprune.models.uncompiled import uncompiled

# Attention operators that torch's counter does not know, or knows for equal numbers of query and key/value heads only.
ATTENTION_OPERATORS = (
    "headprune.attention", "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
GROUPED_PRODUCTS = ("aten._grouped_mm", "transformers.grouped_mm_fallback")  # of experts, which torch's counter does not know


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's distinct parameters and buffers; of quantised ones what they hold inside."""
    return sum(stored_bytes(part) for tensor in (*model.parameters(), *model.buffers()) for part in parts_of(tensor))


def stored_bytes(tensor: Tensor) -> int:
    state = getattr(tensor, "quant_state", None)  # the scales of 4 bits in bitsandbytes
    scales = (getattr(state, "absmax", None), getattr(getattr(state, "state2", None), "absmax", None))
    beside = sum(scale.numel() * scale.element_size() for scale in scales if scale is not None)
    return int(tensor.numel() * tensor.element_size() + beside)


def attention_flops(sites: Sequence[AttentionSite], tokens: int | Mapping[str, TokenCount]) -> int:
    """FLOPs (2 per multiply-add) of all attentions: the four projections, and QK^T and PV of each query with all keys, or
    as many as its sliding window holds (no causal discount); softmax and biases are not counted. Keys and values of an earlier
    attention are projected there.

    tokens: of one sequence that each of them runs once, or what each runs (`headprune.evaluation.token_counts`).
    """
    total = 0
    for site in sites:
        count = TokenCount(tokens, tokens, tokens * tokens) if isinstance(tokens, int) else tokens[site.name]
        pairs = min(count.pairs, count.queries * (site.keys_in_window or count.pairs))
        queries, kv = site.head_map.query_heads, site.own_keys * site.head_map.kv_heads
        of_query = queries * (site.head_dim + site.gate_width + site.value_dim)
        of_key = kv * (site.head_dim + site.value_dim)
        projected = count.queries * of_query + count.keys * of_key
        total += 2 * site.hidden_size * projected + 2 * pairs * queries * (site.head_dim + site.value_dim)
    return total


@torch.no_grad()
def model_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs (2 per multiply-add) of `model(**inputs)` for each sequence: all matrix products (also of integers) and convolutions
    that run, QK^T and PV without a causal discount; nothing else."""
    counted: dict[str, Callable[..., int]] = {
        **dict.fromkeys(ATTENTION_OPERATORS, attention_operator_flops), **dict.fromkeys(GROUPED_PRODUCTS, grouped_flops),
        "aten._int_mm": product_flops,
    }  # fmt: skip
    operators = ((found_operator(name), flops) for name, flops in counted.items())
    mapping = {operator: flops for operator, flops in operators if operator is not None}
    # The counter follows modules by the gradients of what they are given, and a view of a parameter has none here (DeBERTa).
    with frozen(model), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(**placed(model, inputs))
    total: int = counter.get_total_flops()
    return total // rows_of(inputs)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def rows_of(inputs: Mapping[str, Tensor]) -> int:
    """Sequences in a batch."""
    rows: int = next(iter(inputs.values())).shape[0]
    return rows


def product_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes are [rows, inner] and [inner, columns]."""
    return 2 * left[0] * left[1] * right[1]


def attention_operator_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes are [batch, heads, tokens, features]."""
    batch, heads, tokens, head_dim = query
    return 2 * batch * heads * tokens * key[2] * (head_dim + value[3])


def grouped_flops(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes are [rows, features], each row multiplied with one of the weights [groups, features, features of the output]."""
    return 2 * rows[0] * rows[1] * weights[2]


def found_operator(name: str) -> Any:
    """torch.ops' operator of this name, or None where this torch has none."""
    namespace, _, operator = name.partition(".")
    return getattr(getattr(torch.ops, namespace), operator, None)


def sequence_length(model: nn.Module, sites: Sequence[AttentionSite], inputs: Mapping[str, Tensor]) -> int:
    """Tokens of a sequence as the first attention sees them: of `input_ids`, or (images) as its module receives them."""
    if "input_ids" in inputs:
        return inputs["input_ids"].shape[1]
    seen: list[int] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() == 3)
        seen.extend(state.shape[1] for state in states)

    hook = sites[0].module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with uncompiled(model), torch.no_grad():
            model(**placed(model, inputs))
    finally:
        hook.remove()
    return seen[0] if seen else 0


def kv_cache_bytes_per_token(sites: Sequence[AttentionSite], bytes_per_value: int = 4) -> int:
    """Bytes that one token adds to the key/value cache of `sites`, as the model itself fills it."""
    return sum(site.cache.of(site.head_map) for site in sites) * bytes_per_value


def cached_bytes_per_token(model: nn.Module, sites: Sequence[AttentionSite], bytes_per_value: int) -> int | None:
    """`kv_cache_bytes_per_token` of those of the model's `sites` that fill a cache; None where none does (BERT, ViT)."""
    found = caching_sites(model, sites)
    return kv_cache_bytes_per_token(found, bytes_per_value) if found else None
