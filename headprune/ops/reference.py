"""Every operator in plain PyTorch: the specification that the kernels are tested against, and the last resort.

It forms the whole [query_len, kv_len] matrix and computes in fp32, or in fp64 where the input is fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.ops.call import AttentionCall, DecodeCall, VarlenCall
from headprune.ops.weight_slices import WeightCall


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """output [batch, query_heads, query_len, value_dim] in the query's dtype, lse [batch, query_heads, query_len] in
    fp32, or fp64 for fp64 (natural logarithm of the softmax denominator, -inf where a row attends to nothing), packed
    statistics (HeadStats)."""
    scores, allowed, lse, attends, probs = probabilities(call)
    groups = torch.tensor(call.head_map.kv_of_query, dtype=torch.long, device=call.query.device)
    value = call.value.to(probs.dtype).index_select(1, groups)
    output = torch.matmul(probs, value.masked_fill(unseen(allowed), 0.0))
    if call.gate is not None:
        output = output * per_sample(call.gate).to(probs.dtype)[..., None, None]
    packed = attention_stats(call, scores, probs, lse, attends, output) if call.stats else call.empty_stats()
    output = output.to(call.query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return output, lse, packed


def probabilities(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores (-inf where masked), allowed (bool) and probabilities, each [batch, query_heads, query_len, kv_len]; lse and
    attends (bool: the row has something to attend to), each [batch, query_heads, query_len]. In fp32, or fp64 for fp64."""
    work = torch.promote_types(call.query.dtype, torch.float32)
    groups = torch.tensor(call.head_map.kv_of_query, dtype=torch.long, device=call.query.device)
    key = call.key.to(work).index_select(1, groups)
    allowed = visible(call)
    key = key.masked_fill(unseen(allowed), 0.0)
    scores = torch.matmul(call.query.to(work) * call.scale, key.transpose(2, 3))
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes.to(work)[None, :, None, None] * distances(call).to(work)
    if call.bias is not None and call.bias.dtype != torch.bool:
        scores = scores + call.bias.to(work)
    scores = scores.masked_fill(~allowed, float("-inf"))
    denominators = scores
    if call.sinks is not None:
        sink = call.sinks.to(work)[None, :, None, None].expand(*scores.shape[:3], 1)
        denominators = torch.cat([scores, sink], dim=3)
    nothing = (denominators == float("-inf")).all(dim=3)  # also where there is no key; logsumexp's gradient would be NaN
    denominators = denominators.masked_fill(nothing[..., None], 0.0)
    lse = torch.logsumexp(denominators, dim=3).masked_fill(nothing, float("-inf"))
    attends = allowed.any(dim=3) & (lse != float("-inf"))  # a row of NaN or infinite scores gives NaN, not 0
    probs = torch.softmax(denominators, dim=3)[..., : call.kv_len]  # not from the lse, which has lost digits of large scores
    probs = probs.masked_fill(~(allowed & attends[..., None]), 0.0)
    return scores, allowed, lse, attends, probs


def unseen(allowed: Tensor) -> Tensor:
    """bool [batch, query_heads, kv_len, 1]: keys that no query sees. They may hold inf or NaN, and 0 * inf must reach neither
    the output nor a gradient."""
    return ~allowed.any(dim=2)[..., None]


def attention_stats(call: AttentionCall, scores: Tensor, probs: Tensor, lse: Tensor, attends: Tensor, output: Tensor) -> Tensor:
    counted = attends if call.query_mask is None else attends & call.query_mask[:, None, :]
    if call.gate is not None:
        counted = counted & (per_sample(call.gate) != 0)[..., None]
    rows = counted.sum(dim=2).clamp(min=1)

    def row_mean(values: Tensor) -> Tensor:
        return values.masked_fill(~counted, 0.0).sum(dim=2) / rows

    first = torch.zeros_like(lse)
    max_prob, max_logit = torch.zeros_like(lse), torch.full_like(lse, float("-inf"))
    if call.kv_len:
        first = probs.gather(3, first_valid_key(call)[:, None, None, None].expand(*probs.shape[:3], 1)).squeeze(3)
        max_prob, max_logit = probs.amax(dim=3), scores.amax(dim=3)
    max_logit = max_logit.masked_fill(~counted, float("-inf"))
    entropy = -torch.where(probs != 0, probs * (scores - lse[..., None]), 0.0).sum(dim=3)
    distance = (probs * distances(call).to(probs.dtype)).sum(dim=3)
    top = max_logit.amax(dim=2) if call.query_len else max_logit.new_full(max_logit.shape[:2], float("-inf"))
    fields = [row_mean(entropy), row_mean(max_prob), top, row_mean(first), row_mean(distance), row_mean(output.norm(dim=3))]
    return torch.stack([field.float() for field in fields])


def attention_backward(
    call: AttentionCall, grad_output: Tensor, needs: tuple[bool, ...], again: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, sinks and gate (None where `needs` says no), each in its tensor's dtype. again: they
    are to be differentiated in their turn."""
    names = ("query", "key", "value", "bias", "sinks", "gate")
    return differentiate(attention_forward, call, names, needs, grad_output, again)


def differentiate(
    forward: Callable[..., Any],
    call: AttentionCall | VarlenCall,
    names: tuple[str, ...],
    needs: tuple[bool, ...],
    grad_output: Tensor,
    again: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients, by autograd, of those arguments `names` of `forward(call)`'s output for which `needs` says yes."""
    inputs = {name: getattr(call, name) for name in names}
    wanted = [name for name, need in zip(names, needs) if need]
    # Tensors of their own: one tensor may be several arguments.
    leaves = {name: inputs[name].view_as(inputs[name]) if again else inputs[name].detach().requires_grad_() for name in wanted}
    with torch.enable_grad():
        output, _, _ = forward(replace(call, stats=False, **leaves))
    # A detached output (no head, no key) leaves every gradient zero.
    some = output.requires_grad
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=again, allow_unused=True) if some else []
    found = {name: grad for name, grad in zip(wanted, grads) if grad is not None}
    return tuple(found.get(name, torch.zeros_like(inputs[name])) if name in leaves else None for name in names)


VARLEN_DIFFERENTIABLE = ("query", "key", "value", "sinks", "gate")


def attention_varlen_forward(call: VarlenCall) -> tuple[Tensor, Tensor, Tensor]:
    """output [tokens, query_heads, value_dim], lse [query_heads, tokens], packed statistics [6, sequences, query_heads]:
    `attention_forward` on each sequence alone."""
    tokens, heads = call.query.shape[:2]
    output = call.query.new_zeros((tokens, heads, call.value_dim))
    lse = call.query.new_full((heads, tokens), float("-inf"), dtype=torch.promote_types(call.query.dtype, torch.float32))
    outputs, packed = [], []
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    check_starts("cu_seqlens_q", starts_q, tokens)
    check_starts("cu_seqlens_k", starts_k, call.key.shape[0])
    for index, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(starts_q), pairwise(starts_k))):
        one = AttentionCall(
            call.query[q0:q1].transpose(0, 1)[None],
            call.key[k0:k1].transpose(0, 1)[None],
            call.value[k0:k1].transpose(0, 1)[None],
            call.head_map, call.causal, call.window, call.scale, call.softcap, None, call.alibi_slopes, call.sinks, None, None,
            None if call.gate is None else per_sample(call.gate)[index if call.gate.dim() == 2 else 0],
            call.stats,
        )  # fmt: skip
        found, found_lse, found_stats = attention_forward(one)
        outputs.append(found[0].transpose(0, 1))
        lse[:, q0:q1] = found_lse[0]
        packed.append(found_stats)
    if outputs:
        output = torch.cat([*outputs, output[starts_q[-1] :]])
    stats = call.empty_stats()
    if call.stats and packed:
        stats = torch.cat(packed, dim=1)
    return output, lse, stats


def check_starts(name: str, starts: Sequence[int], tokens: int) -> None:
    if starts and starts[0]:
        raise InvalidInput(f"{name} begins with {starts[0]}; expected 0, the first token.")
    for index, (before, start) in enumerate(pairwise(starts), 1):
        if not before <= start <= tokens:
            raise InvalidInput(
                f"{name}[{index}] is {start} behind {before}; expected starts that do not fall and end within the {tokens} tokens."
            )


def attention_varlen_backward(
    call: VarlenCall, grad_output: Tensor, needs: tuple[bool, ...], again: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, sinks and gate (None where `needs` says no), each in its tensor's dtype; again: as in
    `attention_backward`."""
    return differentiate(attention_varlen_forward, call, VARLEN_DIFFERENTIABLE, needs, grad_output, again)


def attention_decode(call: DecodeCall) -> Tensor:
    """output [batch, query_heads, new, value_dim]: each sample's new tokens against the first lengths[sample] cached keys."""
    check_lengths(call)
    key, value = call.key_cache, call.value_cache
    if call.page_table is not None:
        key, value = (gathered_pages(cache, call.page_table) for cache in (key, value))
    positions = torch.arange(key.shape[2], device=key.device)
    lengths = call.lengths.to(key.device).long()
    queries = torch.arange(call.new, device=key.device) - call.new + lengths[:, None]
    ahead = positions[None, None, :] - queries[:, :, None]
    allowed = ahead <= 0
    if call.window:
        allowed = allowed & (ahead > -call.window)
    if call.key_mask is not None:
        allowed = allowed & call.key_mask[:, None, :]
    bias = torch.where(allowed, 0.0, float("-inf"))[:, None]
    if call.alibi_slopes is not None:
        work = torch.promote_types(call.query.dtype, torch.float32)
        bias = bias - call.alibi_slopes.to(work)[None, :, None, None] * ahead.abs()[:, None]
    one = AttentionCall(
        call.query, key, value, call.head_map, False, 0, call.scale, call.softcap, bias, None, call.sinks, None, None, call.gate,
        False,
    )  # fmt: skip
    return attention_forward(one)[0]


def check_lengths(call: DecodeCall) -> None:
    """InvalidInput for lengths beyond the cache, where they can be read: not on a GPU, in a trace or a transform."""
    unread = not call.lengths.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    for index, length in enumerate([] if unread else call.lengths.tolist()):
        if not 0 <= length <= call.capacity:
            raise InvalidInput(f"lengths[{index}] is {length}; the cache holds 0 to {call.capacity} keys.")


def head_weight_stats(call: WeightCall) -> Tensor:
    """fp32 [3 or 6, heads]: sum |w|, sum w^2, max |w| and, with gradients, sum w g, sum |w g|, sum (w g)^2 of each head."""
    work = torch.promote_types(call.dtype, torch.float32)
    found = torch.zeros(call.statistics, call.heads, dtype=work, device=call.device)
    for projection, head, heads, start, stride, width in call.spans:
        dim, owners = call.dims[projection], slice(head, head + heads)
        index = torch.arange(heads * width, device=call.device).view(heads, width)
        features = start + stride * (index // width) + index % width

        def sliced(tensor: Tensor, dim: int = dim, features: Tensor = features) -> Tensor:
            return tensor.movedim(dim, 0)[features].flatten(1).to(work)

        w = sliced(call.weights[projection])
        if not w.numel():
            continue
        found[0, owners] += w.abs().sum(1)
        found[1, owners] += w.square().sum(1)
        found[2, owners] = torch.maximum(found[2, owners], w.abs().amax(1))
        if call.grads:
            products = w * sliced(call.grads[projection])
            found[3, owners] += products.sum(1)
            found[4, owners] += products.abs().sum(1)
            found[5, owners] += products.square().sum(1)
    return found.float()


def gathered_pages(cache: Tensor, page_table: Tensor) -> Tensor:
    """cache [pages, kv_heads, page_size, dim] as [batch, kv_heads, pages_per_sample * page_size, dim]."""
    # Entries behind a sample's length may hold anything.
    pages = cache[page_table.long().clamp(0, cache.shape[0] - 1)]
    return pages.permute(0, 2, 1, 3, 4).flatten(2, 3)


def visible(call: AttentionCall) -> Tensor:
    """bool, broadcast to [batch, query_heads, query_len, kv_len]: which key each query may attend to."""
    ahead = key_positions(call)[None, :] - query_positions(call)[:, None]
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if call.causal:
        allowed = ahead <= 0
    if call.window:
        allowed = allowed & (ahead.abs() < call.window)
    allowed = allowed[None, None]
    if call.key_mask is not None:
        allowed = allowed & call.key_mask[:, None, None, :]
    if call.bias is not None:
        allowed = allowed & (call.bias if call.bias.dtype == torch.bool else call.bias != float("-inf"))
    return allowed.expand(call.batch, call.query_heads, call.query_len, call.kv_len)


def query_positions(call: AttentionCall) -> Tensor:
    """Position of each query among the keys, [query_len]: bottom-right aligned, the last query stands at the last key."""
    return torch.arange(call.query_len, device=call.query.device) + (call.kv_len - call.query_len)


def key_positions(call: AttentionCall) -> Tensor:
    return torch.arange(call.kv_len, device=call.query.device)


def distances(call: AttentionCall) -> Tensor:
    return (query_positions(call)[:, None] - key_positions(call)[None, :]).abs()


def first_valid_key(call: AttentionCall) -> Tensor:
    """[batch]: the first key that key_mask lets through (0 without a mask)."""
    if call.key_mask is None:
        return torch.zeros(call.batch, dtype=torch.long, device=call.query.device)
    return call.key_mask.int().argmax(dim=1)


def per_sample(gate: Tensor) -> Tensor:
    """`gate` as [batch or 1, query_heads]."""
    return gate if gate.dim() == 2 else gate[None]
