"""`torch.nn.functional.scaled_dot_product_attention`'s signature and semantics on our operator, with ragged groups."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from headprune.arguments import explained
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.attention import attention
from headprune.ops.call import check_bias, check_dense, equal_groups


@explained
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    head_map: HeadMap | None = None,
) -> Tensor:
    """What torch's function of this name gives.

    Args:
        query: [..., heads, query_len, head_dim], 2 dimensions or more; the leading ones broadcast among query, key, value.
        key, value: [..., kv_heads, kv_len, dim]; with enable_gqa or head_map kv_heads need not be that of query.
        attn_mask: bool (True = attend) or added to the scores; broadcasts to [..., heads, query_len, kv_len].
        dropout_p: dropped as torch drops it, on key and value heads repeated for their query heads.
        is_causal: query i sees the keys up to i, counted from the first (torch aligns top-left; `attention` bottom-right).
        head_map: which key/value head each query head reads (dimension -3), for ragged groups.

    Returns: [..., heads, query_len, value_dim]; rows with nothing to attend to give 0.

    Raises InvalidInput for arguments that do not fit each other, as attn_mask together with is_causal.
    """
    if is_causal and attn_mask is not None:
        raise InvalidInput("attn_mask and is_causal exclude each other, as in torch; put the causal part into the mask.")
    if not 0 <= dropout_p <= 1:
        raise InvalidInput(f"dropout_p is {dropout_p}; expected the share to drop, 0 to 1.")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise InvalidInput(f"query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; expected 2 or more.")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dense(name, tensor)
    flat = max(query.dim(), key.dim(), value.dim()) == 2
    tensors = [tensor[None] if tensor.dim() == 2 else tensor for tensor in (query, key, value)]
    batch = _broadcast("leading dimensions", *(tensor.shape[:-3] for tensor in tensors))
    if not enable_gqa and head_map is None:
        way_out = "enable_gqa=True or a head_map lets query heads share key/value heads"
        heads = _broadcast("heads (dimension -3)", *(tensor.shape[-3:-2] for tensor in tensors), way_out=way_out)
        tensors = [tensor.expand(*tensor.shape[:-3], *heads, *tensor.shape[-2:]) for tensor in tensors]
    query, key, value = (_one_batch_dimension(tensor, batch) for tensor in tensors)
    head_map = head_map or equal_groups(query.shape[1], key.shape[1])
    mask = attn_mask if attn_mask is None or attn_mask.dim() <= 3 else _one_batch_dimension(attn_mask, batch)
    if mask is not None:
        check_bias(mask, (*query.shape[:3], key.shape[2]), "attn_mask")
    if dropout_p:
        key, value = (repeated_heads(tensor, head_map) for tensor in (key, value))
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale=scale)
    else:
        output = _attend(query, key, value, head_map, mask, is_causal, scale)
    output = output.reshape(*batch, *output.shape[1:])
    return output[0] if flat else output


def repeated_heads(tensor: Tensor, head_map: HeadMap) -> Tensor:
    """`tensor` [batch, kv_heads, length, dim] with its head repeated for each query head: [batch, query_heads, length, dim]."""
    if head_map.kv_of_query == tuple(range(head_map.kv_heads)):
        return tensor
    return tensor.index_select(1, torch.tensor(head_map.kv_of_query, device=tensor.device))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, head_map: HeadMap, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    length, kv_len = query.shape[2], key.shape[2]
    if is_causal and kv_len > length:
        key, value = key[:, :, :length], value[:, :, :length]
    elif is_causal and kv_len < length:
        mask, is_causal = torch.ones(length, kv_len, dtype=torch.bool, device=query.device).tril(), False
    key_mask = None
    if mask is not None and mask.dtype == torch.bool and mask.shape[1:] == (1, 1, kv_len):
        # A padding mask: the kernels then form nothing of size query_len x kv_len.
        key_mask, mask = mask[:, 0, 0].expand(query.shape[0], kv_len), None
    return attention(query, key, value, head_map, causal=is_causal, scale=scale, bias=mask, key_mask=key_mask)


def _broadcast(name: str, *shapes: tuple[int, ...], way_out: str = "give them equal ones, or 1") -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        given = ", ".join(str(list(shape)) for shape in shapes)
        raise InvalidInput(f"the {name} of query, key and value are {given}, which do not broadcast: {way_out}.") from None


def _one_batch_dimension(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """[..., heads, rows, columns] as [batch, heads, rows, columns], with leading dimensions broadcast to `batch`."""
    lead, rest = tensor.shape[:-3], tensor.shape[-3:]
    if len(lead) > len(batch) or any(have != 1 and have != want for have, want in zip(reversed(lead), reversed(batch))):
        raise InvalidInput(f"attn_mask has leading dimensions {list(lead)}; they do not broadcast to {list(batch)}.")
    return tensor.expand(*batch, *rest).reshape(math.prod(batch), *rest)
