"""torch.nn.MultiheadAttention's masks (True = do not attend) as the operators take them (True = attend)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.ops.call import has_shape


@dataclass(frozen=True)
class Masks:
    """`causal`: query i sees the keys up to i. `bias`: added to the scores, or bool; broadcasts to [batch, heads, query_len,
    kv_len]. `key_mask`: bool [batch, kv_len]."""

    causal: bool
    bias: Tensor | None
    key_mask: Tensor | None

    def merged(self, query: Tensor, kv_len: int) -> Tensor | None:
        """All of them in one mask for torch's attention, bool or of the query's dtype; None where nothing is hidden."""
        causal = torch.ones(query.shape[2], kv_len, dtype=torch.bool, device=query.device).tril() if self.causal else None
        padding = None if self.key_mask is None else self.key_mask[:, None, None]
        visible = causal if padding is None else padding if causal is None else causal & padding
        bias = self.bias if self.bias is None or self.bias.dtype == torch.bool else self.bias.to(query.dtype)
        if bias is None or visible is None:
            return visible if bias is None else bias
        return bias & visible if bias.dtype == torch.bool else bias.masked_fill(~visible, float("-inf"))


def read_masks(
    query: Tensor, kv_len: int, extra: int, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool, need_weights: bool
) -> Masks:
    """`query` [batch, heads, query_len, dim] against `kv_len` keys, the last `extra` of which no mask hides.

    Raises InvalidInput for shapes and dtypes that torch does not take either.
    """
    batch, heads, length, _ = query.shape
    if is_causal and attn_mask is None:
        raise InvalidInput("is_causal is a hint about attn_mask, which must be given too (as in torch).")
    shapes = [(length, kv_len - extra), (batch * heads, length, kv_len - extra)]
    attn_mask = _checked("attn_mask", attn_mask, shapes, extra)
    padding = _checked("key_padding_mask", padding, [(batch, kv_len - extra)], extra)
    hinted = is_causal and not need_weights
    causal = hinted and length == kv_len and (padding is None or not extra)
    if causal:
        attn_mask = None
    elif hinted and padding is None:
        # Here torch drops the mask for the hint, and counts from the first key.
        attn_mask = ~torch.ones(length, kv_len, dtype=torch.bool, device=query.device).tril()
    bias = attn_mask.unflatten(0, (batch, heads)) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    if padding is not None and padding.dtype != torch.bool:
        added = padding[:, None, None].to(query.dtype)
        return Masks(causal, added if bias is None else added + _as_added(bias, query.dtype), None)
    if bias is not None and bias.dtype == torch.bool:
        bias = ~bias
    return Masks(causal, bias, None if padding is None else ~padding)


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def _checked(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]], extra: int) -> Tensor | None:
    """`mask` with `extra` keys more, which all may attend to."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InvalidInput(f"{name} is {mask.dtype}; expected bool (True = do not attend) or a floating type.")
    if not has_shape(mask, shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise InvalidInput(f"{name} has shape {list(mask.shape)}; expected {wanted}.")
    return F.pad(mask, (0, extra)) if extra else mask
