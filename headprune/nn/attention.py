"""VariableHeadAttention: torch.nn.MultiheadAttention with any head count, head size and ragged groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.head_map import HeadMap
from headprune.nn.given import out_of_inference_mode
from headprune.nn.masks import Masks, read_masks
from headprune.nn.weights import (
    ROLES,
    UNDO,
    beside_weights,
    check_own_weights,
    draw_like_torch,
    kept,
    resized,
    torch_parameter,
    undrawn_linear,
    unpack,
)
from headprune.ops.gate import gate_of
from headprune.ops.sdpa import repeated_heads
from headprune.ops.watch import attention_of, is_watched


class VariableHeadAttention(nn.Module):
    """A drop-in for torch.nn.MultiheadAttention: same constructor, same forward, same numbers.

    What torch's layer has not: heads can be pruned (`prune`), head_dim need not be embed_dim / num_heads, query heads can
    share key/value heads in equal or ragged groups (`head_map`), and each head can carry a learnable gate.
    The projections are separate (`q_proj`, `k_proj`, `v_proj`, `out_proj`); `load_state_dict` also takes the state dict of
    a torch.nn.MultiheadAttention, and that of a pruned layer of this kind (the layer then takes its shape).

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            torch.nn.MultiheadAttention.
        num_kv_heads: key/value heads, each read by equally many query heads; default num_heads.
        head_dim: features of a head; default embed_dim // num_heads.
        head_map: ragged groups; takes the place of num_kv_heads.
        gate: adds the parameter `gate` [num_heads], a factor on each head's output, 1 at first.

    Raises InvalidInput where embed_dim does not divide by num_heads and head_dim is not given, or the heads contradict.
    """

    # torch.nn.TransformerEncoderLayer reads this before it runs its own fused kernel, which knows packed equal heads only.
    _qkv_same_embed_dim = False
    kv_of_query: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        head_map: HeadMap | None = None,
        gate: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(VariableHeadAttention.__init__, locals())
        if embed_dim <= 0 or num_heads <= 0:
            raise InvalidInput(f"embed_dim={embed_dim}, num_heads={num_heads}; both must be above 0.")
        for name, value in (("head_dim", head_dim), ("kdim", kdim), ("vdim", vdim)):
            if value is not None:
                whole_number(name, value)
        if not 0 <= dropout <= 1:
            raise InvalidInput(f"dropout is {dropout}; expected the share to drop, 0 to 1.")
        if head_dim is None and embed_dim % num_heads:
            raise InvalidInput(f"embed_dim={embed_dim} does not divide by num_heads={num_heads}; give head_dim.")
        if head_map is not None and (head_map.query_heads != num_heads or num_kv_heads not in (None, head_map.kv_heads)):
            raise InvalidInput(f"head_map is {head_map}; expected {num_heads} query and {num_kv_heads} key/value heads.")
        self.head_map = head_map or HeadMap.uniform(num_heads, num_kv_heads)
        self.head_dim = head_dim or embed_dim // num_heads
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        query_width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.out_proj = nn.Linear(query_width, embed_dim, bias=bias, **place)
        self.q_proj = undrawn_linear(embed_dim, query_width, bias, **place)
        self.k_proj = undrawn_linear(self.kdim, kv_width, bias, **place)
        self.v_proj = undrawn_linear(self.vdim, kv_width, bias, **place)
        self.bias_k = nn.Parameter(torch.empty(1, 1, kv_width, **place)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, kv_width, **place)) if add_bias_kv else None
        self.gate = nn.Parameter(torch.empty(num_heads, **place)) if gate else None
        # In the state dict, so that a pruned layer's weights say what they are.
        self.register_buffer("kv_of_query", torch.empty(num_heads, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as torch.nn.MultiheadAttention draws them (there query, key and value are one packed matrix); the output
        projection keeps those of nn.Linear. Gates are 1 again, and `kv_of_query` the head map (after `to_empty`)."""
        draw_like_torch((self.q_proj, self.k_proj, self.v_proj), packed=self.embed_dim == self.kdim == self.vdim)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)
        if self.gate is not None:
            nn.init.ones_(self.gate)
        self.kv_of_query.copy_(torch.tensor(self.head_map.kv_of_query, device=self.kv_of_query.device))

    @property
    def num_heads(self) -> int:
        return self.head_map.query_heads

    @property
    def num_kv_heads(self) -> int:
        return self.head_map.kv_heads

    @property
    def in_proj_weight(self) -> Tensor | None:
        """torch's packed form [query, key and value features, embed_dim], a copy; None where the inputs differ in width."""
        if not self.embed_dim == self.kdim == self.vdim:
            return None
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """torch's packed form [query, key and value features], a copy; None without bias."""
        return None if self.q_proj.bias is None else torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.forward: (output, weights or None); masks are True (or -inf) where NOT to attend.

        Args:
            query: [query_len, embed_dim], or with a batch as second (batch_first: first) dimension; key [kv_len, kdim] and
                value [kv_len, vdim] likewise.
            key_padding_mask: bool or floating [batch, kv_len] ([kv_len] without a batch).
            attn_mask: bool or floating [query_len, kv_len], or [batch * num_heads, query_len, kv_len] with this layer's
                present number of heads.
            need_weights: also return the attention weights, averaged over the heads (average_attn_weights) or per head;
                this forms the whole matrix. Without, the operators of headprune.ops run.
            is_causal: a hint that attn_mask is causal; it must be given too.

        A query that may attend to nothing gives 0, with weights too (torch: NaN then).
        Raises InvalidInput for shapes and masks that do not fit.
        """
        batched = self._check_inputs(query, key, value)
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = key_padding_mask if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        if not self.num_heads:
            none = no_weights(query, key.shape[1] + extra, average_attn_weights) if need_weights else None
            return self._output(query.new_zeros(*query.shape[:2], 0), none, batched)
        q, k, v = self._heads(query, key, value)
        masks = read_masks(q, k.shape[2], extra, attn_mask, key_padding_mask, is_causal, need_weights)
        options: dict[str, Any] = {"causal": masks.causal, "bias": masks.bias, "key_mask": masks.key_mask, "gate": self.gate}
        weights = None
        if need_weights:
            if is_watched(self):
                attention_of(self, q, k, v, self.head_map, **options)
            output, weights = self._attend_with_weights(q, k, v, masks)
        elif self.training and self.dropout:
            output = self._attend_with_dropout(q, k, v, masks)
        else:
            output = attention_of(self, q, k, v, self.head_map, **options)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        return self._output(output.transpose(1, 2).flatten(2), weights, batched)

    def _output(self, heads: Tensor, weights: Tensor | None, batched: bool) -> tuple[Tensor, Tensor | None]:
        """Projected, in the caller's order of dimensions. heads: [batch, query_len, all heads' features]."""
        output = self.out_proj(heads)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return (output if self.batch_first else output.transpose(0, 1).contiguous()), weights  # torch's can be viewed there

    @out_of_inference_mode()
    def prune(self, keep: Iterable[int]) -> VariableHeadAttention:
        """Cuts all query heads but `keep` (numbered as they are now) out of the weights, in place; returns the layer.

        A key/value head goes with the last query head that reads it; without heads the output bias is left. The parameters are
        new ones: an optimizer made before holds the old. Raises InvalidInput for heads that do not exist, and where a mask,
        parametrisation or adapter makes the weights.
        """
        heads = self.head_map.checked(keep)
        check_own_weights(self)
        rows, kv_rows = self._features(heads), self._features(self.head_map.kept_kv_heads(heads))
        for projection, features in ((self.q_proj, rows), (self.k_proj, kv_rows), (self.v_proj, kv_rows)):
            projection.weight = kept(projection.weight, 0, features)
            projection.bias = kept(projection.bias, 0, features)
        self.out_proj.weight = kept(self.out_proj.weight, 1, rows)
        self.bias_k, self.bias_v = kept(self.bias_k, 2, kv_rows), kept(self.bias_v, 2, kv_rows)
        self.gate = kept(self.gate, 0, torch.tensor(heads, dtype=torch.long))
        self._take_shape(self.head_map.keep(heads))
        return self

    @classmethod
    def from_torch(cls, layer: nn.MultiheadAttention) -> VariableHeadAttention:
        """A layer with the weights (copied), options and mode of `layer`. Raises InvalidInput where something makes its weights."""
        check_arguments(VariableHeadAttention.from_torch, {"layer": layer})
        beside = beside_weights(layer)
        if beside is not None:
            raise InvalidInput(f"the {type(layer).__name__} holds {beside} beside its weights; {UNDO}.")
        new = cls(
            layer.embed_dim, layer.num_heads, layer.dropout, layer.in_proj_bias is not None, layer.bias_k is not None,
            layer.add_zero_attn, layer.kdim, layer.vdim, layer.batch_first, "meta", layer.out_proj.weight.dtype,
        )  # fmt: skip
        state = layer.state_dict()
        unpack(state, "", new.head_map.kv_of_query, None)
        new.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(torch_parameter(layer, name).requires_grad)
        return new.train(layer.training)

    def to_torch(self) -> nn.MultiheadAttention:
        """The torch layer with these weights (copied). Raises InvalidInput where torch's layer cannot be that, and where something
        makes the weights."""
        check_own_weights(self)
        if self.head_map != HeadMap.uniform(self.num_heads) or self.num_heads * self.head_dim != self.embed_dim:
            raise InvalidInput(
                f"{self.head_map} heads of {self.head_dim} in {self.embed_dim} features: torch.nn.MultiheadAttention needs one "
                "key/value head per query head and num_heads * head_dim = embed_dim; a pruned layer has no torch form."
            )
        if self.gate is not None:
            raise InvalidInput("the layer has gates, torch's has not; multiply them into out_proj.weight and set gate to None.")
        place: dict[str, Any] = {"device": self.out_proj.weight.device, "dtype": self.out_proj.weight.dtype}
        options = (self.q_proj.bias is not None, self.bias_k is not None, self.add_zero_attn, self.kdim, self.vdim)
        new = nn.MultiheadAttention(self.embed_dim, self.num_heads, self.dropout, *options, self.batch_first, **place)
        state = {"in_proj_weight": self.in_proj_weight, "in_proj_bias": self.in_proj_bias}
        state |= {f"out_proj.{name}": tensor for name, tensor in self.out_proj.named_parameters()}
        state |= {"bias_k": self.bias_k, "bias_v": self.bias_v}
        if self.in_proj_weight is None:
            state |= {f"{role}_proj_weight": getattr(self, f"{role}_proj").weight for role in ROLES}
        new.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
        new.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                torch_parameter(new, name).requires_grad_()
        return new.train(self.training)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first, of a model that holds the layer too."""
        raise untaken("torch.jit.script")

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.head_map}, head_dim={self.head_dim}, batch_first={self.batch_first}"

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there is a batch dimension."""
        if isinstance(query, Proxy):
            raise untaken("torch.fx.symbolic_trace", ", and a Tracer whose is_leaf_module keeps it whole")
        if query.is_nested or key.is_nested or value.is_nested:
            raise InvalidInput(
                "nested tensors are not supported. In a torch.nn.TransformerEncoder set `use_nested_tensor = False`, or swap its "
                "layers by headprune.nn.replace_multihead_attention, which does so."
            )
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise InvalidInput(f"query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; expected all 2 or 3.")
        for name, tensor, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.shape[-1] != width:
                raise InvalidInput(f"{name} has {tensor.shape[-1]} features; expected {width}.")
        if key.shape[:-1] != value.shape[:-1]:
            raise InvalidInput(f"key is {list(key.shape)}, value {list(value.shape)}; all but the features must agree.")
        if query.dim() == 3 and query.shape[int(not self.batch_first)] != key.shape[int(not self.batch_first)]:
            order = "batch first" if self.batch_first else "length first"
            raise InvalidInput(f"query is {list(query.shape)}, key {list(key.shape)}, {order}; both must have the same batch.")
        return query.dim() == 3

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, [batch, heads, length, head_dim], with the learned and the zero key behind the others."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            batch = key.shape[0]
            k, v = torch.cat([k, self.bias_k.expand(batch, -1, -1)], 1), torch.cat([v, self.bias_v.expand(batch, -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return tuple(tensor.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        k, v = repeated_heads(k, self.head_map), repeated_heads(v, self.head_map)
        scores = torch.matmul(q * (1 / math.sqrt(self.head_dim)), k.transpose(2, 3))
        mask = masks.merged(q, k.shape[2])
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        hidden = scores == float("-inf")
        scores = scores.masked_fill(hidden.all(dim=3, keepdim=True), 0.0)  # a row of -inf has a gradient of NaN
        weights = scores.softmax(dim=3).masked_fill(hidden, 0.0)
        weights = F.dropout(weights, self.dropout, self.training)
        return self._gated(torch.matmul(weights, v)), weights

    def _attend_with_dropout(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        k, v = repeated_heads(k, self.head_map), repeated_heads(v, self.head_map)
        causal = masks.causal and masks.bias is None and masks.key_mask is None
        mask = None if causal else masks.merged(q, k.shape[2])
        return self._gated(F.scaled_dot_product_attention(q, k, v, mask, self.dropout, causal))

    def _gated(self, output: Tensor) -> Tensor:
        gate = gate_of(self, self.gate)
        return output if gate is None else output * gate.to(output)[:, None, None]

    def _features(self, heads: Iterable[int]) -> Tensor:
        starts = torch.tensor(list(heads), dtype=torch.long)[:, None] * self.head_dim
        return (starts + torch.arange(self.head_dim)).flatten()

    def _take_shape(self, head_map: HeadMap) -> None:
        """Sets what depends on the head map, once the weights hold its heads."""
        self.head_map = head_map
        self.kv_of_query = torch.tensor(head_map.kv_of_query, dtype=torch.long, device=self.kv_of_query.device)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.out_features, projection.in_features = projection.weight.shape

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        groups, q, k = (state_dict.get(f"{prefix}{name}") for name in ("kv_of_query", "q_proj.weight", "k_proj.weight"))
        sized = q is not None and groups is not None and len(q) == len(groups) * self.head_dim  # else torch tells what does not fit
        if groups is not None and k is not None and sized and not groups.is_meta:
            head_map = HeadMap(tuple(groups.long().tolist()), len(k) // self.head_dim)
            if head_map != self.head_map:
                self._make_room(head_map)
        unpack(state_dict, prefix, self.head_map.kv_of_query, self.gate)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @out_of_inference_mode()
    def _make_room(self, head_map: HeadMap) -> None:
        """Uninitialised weights of the shape that `head_map` asks for."""
        check_own_weights(self)
        rows, kv_rows = head_map.query_heads * self.head_dim, head_map.kv_heads * self.head_dim
        for projection, count in ((self.q_proj, rows), (self.k_proj, kv_rows), (self.v_proj, kv_rows)):
            projection.weight = resized(projection.weight, 0, count)
            projection.bias = resized(projection.bias, 0, count)
        self.out_proj.weight = resized(self.out_proj.weight, 1, rows)
        self.bias_k, self.bias_v = resized(self.bias_k, 2, kv_rows), resized(self.bias_v, 2, kv_rows)
        self.gate = resized(self.gate, 0, head_map.query_heads)
        self._take_shape(head_map)


def untaken(tracer: str, more: str = "") -> InvalidInput:
    return InvalidInput(f"{tracer} does not take a VariableHeadAttention; torch.export.export and torch.compile do{more}.")


def no_weights(query: Tensor, kv_len: int, averaged: bool) -> Tensor:
    """The attention weights of a layer without heads: none, or averaged 0. query: [batch, query_len, features]."""
    batch, length, _ = query.shape
    return query.new_zeros(batch, length, kv_len) if averaged else query.new_zeros(batch, 0, length, kv_len)
