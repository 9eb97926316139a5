"""`attn_implementation="headprune"`: our attention inside transformers, with its mask function.

transformers calls the attention function with query [batch, query_heads, query_len, head_dim] and unexpanded key and value
after rotary embedding and cache update (transformers 5, `AttentionInterface`). Without a mask function under the same name
it would pass no padding mask at all, so both are registered: by `register`, which `import headprune` sees to. Nothing else here
reads `transformers.modeling_utils`, so that this may be imported while that is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.kv_sharing import reads_keys, shares_keys
from headprune.ops import attention_varlen
from headprune.ops.gate import gate_of
from headprune.ops.sdpa import repeated_heads
from headprune.ops.watch import attention_of, refuse_watched

NAME = "headprune"
# What transformers and its models hand to attention functions and what changes nothing here: a sliding window is in the mask
# already (and read for packed sequences), the rest is for other layers or other kernels.
HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "indices", "labels", "logits_to_keep", "max_length_k",
    "max_length_q", "mm_token_type_ids", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "return_dict", "return_shared_kv_states", "seq_idx", "sliding_window", "use_cache",
}  # fmt: skip


def register() -> None:
    """Makes attn_implementation="headprune" known to transformers, whose modeling_utils has been imported."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, headprune_attention)
    AttentionMaskInterface.register(NAME, headprune_mask)


def headprune_mask(
    *,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """What `headprune_attention` gets as its mask.

    A plain padded encoder keeps its 2-D padding mask [batch, kv_len] (nothing of size query_len x kv_len is formed); all
    else gets what SDPA gets: None, or bool [batch, 1, query_len, kv_len].
    """
    plain = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip and not options.get("kv_offset")
    if plain and attention_mask is not None and attention_mask.shape[-1] == options["kv_length"]:
        return attention_mask
    if mask_function is not None:
        options["mask_function"] = mask_function
    # A static cache has no tokens yet behind those of the batch. Layers that read others' keys may be given some of its last
    # tokens alone (Gemma 4), by which that tail can no longer be told.
    if shares_keys(options.get("config")) and 1 < options["q_length"] != options["kv_length"]:
        options["allow_is_causal_skip"] = False
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
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention function: returns ([batch, query_len, query_heads, value_dim], None).

    The head map is the one that surgery left on `module` (`module.head_map`), else equal groups. Attention dropout
    (training alone) runs through torch SDPA on expanded keys and values. With cu_seq_lens_q and cu_seq_lens_k each packed
    sequence sees itself alone.

    Raises InvalidInput for what it cannot honour: attention weights, a paged cache, an argument that it does not know.
    """
    check_arguments(arguments)
    head_map = getattr(module, "head_map", None) or HeadMap.uniform(query.shape[1], key.shape[1])
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if arguments.get("cu_seq_lens_q") is not None:
        check_packed(module, attention_mask, position_bias, dropout)
        refuse_watched(module, "packed sequences (cu_seq_lens_q)")
        gate = gate_of(module)
        return packed_attention(query, key, value, head_map, causal, scaling, softcap, s_aux, gate, arguments), None
    causal = causal and attention_mask is None and query.shape[2] > 1
    # Such layers (see headprune_mask) see a triangle that ends with the last key, as `causal` means it.
    if causal and key.shape[2] > query.shape[2] and not reads_keys(module):
        # No mask here means an empty static cache (masking_utils._ignore_causal_mask_sdpa): its unwritten tail is never seen.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    attention_mask = as_padding_mask(attention_mask, query, key)
    key_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    bias = merged_bias(attention_mask if key_mask is None else None, position_bias)
    if dropout:
        refuse_watched(module, "attention dropout")
        output = dropped_attention(query, key, value, head_map, causal, scaling, softcap, s_aux, key_mask, bias, dropout)
        gate = gate_of(module)
        output = output if gate is None else output * gate.to(output)[:, None, None]
    else:
        output = attention_of(
            module, query, key, value, head_map, causal=causal, scale=scaling, softcap=softcap, sinks=s_aux, key_mask=key_mask,
            bias=bias,
        )  # fmt: skip
    return output.transpose(1, 2), None


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """InvalidInput for a set argument that may change what attention means."""
    if arguments.get("cache") is not None:
        raise InvalidInput("continuous batching (a paged cache) is not supported by attn_implementation='headprune'.")
    if arguments.get("output_attentions"):
        raise InvalidInput(
            "attn_implementation='headprune' never forms attention weights, so output_attentions has nothing to give. Use "
            "'eager', or read head statistics from headprune.ops.attention(..., stats=True)."
        )
    unknown = [
        name for name, value in arguments.items() if name not in HARMLESS and value is not None and value is not False
    ]  # fmt: skip
    if unknown:
        raise InvalidInput(
            f"attn_implementation='headprune' does not know the argument {', '.join(unknown)}, which may change the result. Where "
            "it does not, add it to headprune.attention_interface.HARMLESS."
        )


def as_padding_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A bool mask of a single query that all heads share, [batch, 1, 1, kv_len], as [batch, kv_len]: with a key mask alone
    the decode kernels run. Any other mask as it is."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, 1, key.shape[2]):
        return mask
    return mask[:, 0, 0].expand(query.shape[0], -1)


def check_packed(module: nn.Module, mask: Tensor | None, position_bias: Tensor | None, dropout: float) -> None:
    """InvalidInput for what a packed batch cannot carry."""
    config = getattr(module, "config", None)
    found = {
        "a 2-D attention mask": mask is not None and mask.dim() == 2,
        "a position bias": position_bias is not None,
        "attention dropout": bool(dropout),
        "chunked attention": getattr(config, "attention_chunk_size", None) is not None,
    }
    for name, present in found.items():
        if present:
            raise InvalidInput(f"packed sequences (cu_seq_lens_q) together with {name} are not supported; leave one of them out.")


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: HeadMap,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    gate: Tensor | None,
    arguments: Mapping[str, Any],
) -> Tensor:
    """transformers' padding-free batches, as its flash attention reads them: each sequence sees itself, causally where the
    module is causal, within its sliding window. The 4-D mask that the model forms out of position_ids says the same."""
    batch, _, length, _ = query.shape
    starts = [arguments["cu_seq_lens_q"], arguments.get("cu_seq_lens_k")]
    if starts[1] is None:
        raise InvalidInput("cu_seq_lens_q is given without cu_seq_lens_k.")
    longest = [arguments.get("max_length_q"), arguments.get("max_length_k")]
    output = attention_varlen(
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2).flatten(0, 1),
        value.transpose(1, 2).flatten(0, 1),
        starts[0].to(query.device, torch.int32),
        starts[1].to(query.device, torch.int32),
        head_map,
        max_seqlen_q=None if longest[0] is None else int(longest[0]),
        max_seqlen_k=None if longest[1] is None else int(longest[1]),
        causal=causal,
        window=arguments.get("sliding_window"),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        gate=gate,
    )
    sequences: Tensor = output.unflatten(0, (batch, length))
    return sequences


def merged_bias(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """One bias out of transformers' 4-D mask (bool, or added) and T5's position bias."""
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, float("-inf"))
    return mask + position_bias


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: HeadMap,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    if softcap or sinks is not None:
        raise InvalidInput("attention dropout together with softcap or sinks is not supported; set the dropout to 0.")
    if key_mask is not None:
        visible = key_mask[:, None, None, :]
        bias = visible if bias is None else bias.masked_fill(~visible, float("-inf"))
    length, kv_len = query.shape[2], key.shape[2]
    if causal and (bias is not None or kv_len > length):  # torch takes one of the two, and counts from the first key
        seen = torch.ones(length, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - length)
        bias, causal = seen if bias is None else bias.masked_fill(~seen, float("-inf")), False
    key, value = repeated_heads(key, head_map), repeated_heads(value, head_map)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale)
