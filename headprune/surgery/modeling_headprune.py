"""A pruned transformers model: the stock class, built with the heads that its config lists.

headprune writes this file beside the weights, so that `AutoModel*.from_pretrained(folder, trust_remote_code=True)` works
with nothing but transformers and torch. `HeadPrunedX` is transformers' X; the `layout` in the config's `headprune` section
says which parameters are smaller and which attributes differ. Layers whose groups differ in size run through headprune's
kernels where it is installed, else through PyTorch on expanded keys and values.
"""

from __future__ import annotations

import contextlib

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

try:
    import headprune  # registers attn_implementation="headprune"
except ImportError:
    headprune = None

PREFIX = "HeadPruned"
# Attention that is only how to compute the same thing; any other name is an engine's own, which takes equal groups alone.
EXCHANGEABLE = ("eager", "sdpa", "flex_attention", "flash_attention", "headprune")
_classes: dict[str, type] = {}


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _classes:
        _classes[name] = pruned_class(name, stock)
    return _classes[name]


def pruned_class(name: str, stock: type, module: str = __name__) -> type:
    """`stock` whose instances are built with the heads that their config lists."""

    def __init__(self, config, *args, **options) -> None:
        section = getattr(config, "headprune", None)
        if not section or section.get("layout") is None:
            raise ValueError(
                f"the config has no headprune layout, so {name} cannot be built from it alone; headprune.load(folder) may."
            )
        with whole(config):
            stock.__init__(self, config, *args, **options)
        shrink(self, section["layout"])

    can_set = stock._can_set_attn_implementation()  # it reads the source of the class's module, which is this one
    members = {"__init__": __init__, "__module__": module, "_can_set_attn_implementation_cached_value": can_set}
    if hasattr(stock, "_can_set_experts_implementation"):
        members["_can_set_experts_implementation_cached_value"] = stock._can_set_experts_implementation()
    return type(name, (stock,), members)


@contextlib.contextmanager
def whole(config):
    """Inside the block `config` describes the original: layers are built alike, and made smaller afterwards."""
    configs = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    specs = [(found, found.__dict__.pop("_heterogeneity_spec", None)) for found in configs if found is not None]
    try:
        yield config
    finally:
        for found, spec in specs:
            if spec is not None:
                found.__dict__["_heterogeneity_spec"] = spec


def shrink(model: nn.Module, layout: dict) -> None:
    """Gives the modules that `layout` names their shapes, attributes and head maps; the values are set by loading."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    ragged = False
    for name, entry in layout.items():
        # A folder saved from the base model also loads with a head on it, and the other way round.
        found = next((modules[key] for key in (name, name.removeprefix(prefix), prefix + name) if key in modules), None)
        if found is None:
            raise ValueError(f"{type(model).__name__} has no module {name}, which the headprune layout of its config names.")
        for parameter, shape in entry.get("shapes", {}).items():
            old = getattr(found, parameter)
            part = old.detach()[tuple(slice(size) for size in shape)].clone()
            setattr(found, parameter, nn.Parameter(part, requires_grad=old.requires_grad))
        for attribute, value in entry.get("attributes", {}).items():
            setattr(found, attribute, value)
        if "head_map" in entry:
            ragged |= set_head_map(found, tuple(entry["head_map"]["kv_of_query"]), entry["head_map"]["kv_heads"])
    if ragged:
        use_ragged_attention(model)


def set_head_map(module: nn.Module, kv_of_query: tuple[int, ...], kv_heads: int) -> bool:
    """Whether the groups of `module` differ in size."""
    ragged = len({kv_of_query.count(kv) for kv in range(kv_heads)}) > 1
    if headprune is not None:
        module.head_map = headprune.HeadMap(kv_of_query, kv_heads)
    elif ragged:
        module.kv_of_query = kv_of_query
        module.num_key_value_groups = 1  # of the expanded keys and values
    return ragged


def use_ragged_attention(model: nn.Module) -> None:
    chosen = model.config._attn_implementation
    if chosen is not None and not chosen.startswith(EXCHANGEABLE):
        raise ValueError(
            f"this model has ragged groups, which attention {chosen!r} cannot run. `headprune export --to vllm` (or another "
            "target) makes the groups equal without changing the outputs."
        )
    model.set_attn_implementation("headprune")


def expanded_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, softcap=None, s_aux=None,
    position_bias=None, **_,
):  # fmt: skip
    """Attention in plain PyTorch with a key/value head for each query head: [batch, query_len, query_heads, value_dim]."""
    kv_of_query = getattr(module, "kv_of_query", None)
    if kv_of_query is None:
        kv_of_query = [head * key.shape[1] // query.shape[1] for head in range(query.shape[1])]
    index = torch.tensor(kv_of_query, device=key.device)
    key, value = key.index_select(1, index), value.index_select(1, index)
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else added(attention_mask, position_bias)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    if softcap is None and s_aux is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None
    if causal:
        attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = added(attention_mask, scores)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.float().softmax(dim=-1).to(query.dtype)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def added(mask, scores):
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


if headprune is None:
    AttentionInterface.register("headprune", expanded_attention)
    AttentionMaskInterface.register("headprune", sdpa_mask)
