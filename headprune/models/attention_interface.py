"""`attn_implementation="headprune"`: our attention inside transformers, with its mask function.

transformers calls the attention function with query [batch, query_heads, query_len, head_dim] and unexpanded key and value
after rotary embedding and cache update (transformers 5, `AttentionInterface`). Without a mask function under the same name
it would pass no padding mask at all, so both are registered.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops import attention

NAME = "headprune"


def headprune_mask(
    *, mask_function=None, attention_mask: Tensor | None = None, allow_is_bidirectional_skip: bool = False, **options
):
    """What `headprune_attention` gets as its mask.

    A plain padded encoder keeps its 2-D padding mask [batch, kv_len] (nothing of size query_len x kv_len is formed); all
    else gets what SDPA gets: None, or bool [batch, 1, query_len, kv_len].
    """
    plain = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip and not options.get("kv_offset")
    if plain and attention_mask is not None and attention_mask.shape[-1] == options["kv_length"]:
        return attention_mask
    if mask_function is not None:
        options["mask_function"] = mask_function
    return sdpa_mask(attention_mask=attention_mask, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **options)


def headprune_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache=None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function: returns ([batch, query_len, query_heads, value_dim], None).

    The head map is the one that surgery left on `module` (`module.head_map`), else equal groups. Attention dropout
    (training alone) runs through torch SDPA on expanded keys and values.
    """
    if cache is not None:
        raise InvalidInput("continuous batching (a paged cache) is not supported by attn_implementation='headprune'.")
    head_map = getattr(module, "head_map", None) or HeadMap.uniform(query.shape[1], key.shape[1])
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # No mask here means an empty static cache (masking_utils._ignore_causal_mask_sdpa): its unwritten tail is never seen.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    key_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    bias = merged_bias(attention_mask if key_mask is None else None, position_bias)
    if dropout:
        output = dropped_attention(query, key, value, head_map, causal, scaling, softcap, s_aux, key_mask, bias, dropout)
    else:
        output = attention(
            query, key, value, head_map, causal=causal, scale=scaling, softcap=softcap, sinks=s_aux, key_mask=key_mask, bias=bias
        )
    return output.transpose(1, 2), None


def merged_bias(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """One bias out of transformers' 4-D mask (bool, or added) and T5's position bias."""
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, float("-inf"))
    return mask + position_bias


def dropped_attention(query, key, value, head_map, causal, scale, softcap, sinks, key_mask, bias, dropout) -> Tensor:
    if softcap or sinks is not None:
        raise InvalidInput("attention dropout together with softcap or sinks is not supported; set the dropout to 0.")
    if key_mask is not None:
        visible = key_mask[:, None, None, :]
        bias = visible if bias is None else bias.masked_fill(~visible, float("-inf"))
    groups = torch.tensor(head_map.kv_of_query, device=query.device)
    key, value = key.index_select(1, groups), value.index_select(1, groups)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale)


AttentionInterface.register(NAME, headprune_attention)
AttentionMaskInterface.register(NAME, headprune_mask)
