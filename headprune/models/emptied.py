"""An attention that has lost all its heads: it adds its output bias alone, and its cache still counts tokens.

transformers reads the length of the past from the cache of one layer (the first of its kind), so an emptied layer keeps a
placeholder there: one key and one value of one feature per token, or as many zeros as were allocated before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.cache_utils import Cache, EncoderDecoderCache

from headprune.models.behaviour import Behaviour

CACHES = ("past_key_values", "past_key_value", "layer_past")
STATES = ("hidden_states", "hidden_state", "query")
SOURCES = ("encoder_hidden_states", "key_value_states")


class Emptied(Behaviour):
    """The forward of an attention module without heads. Its attention weights are those of no head: [batch, 0, queries, keys]."""

    headprune_output: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = next((kwargs[name] for name in STATES if name in kwargs), None)
        states = args[0] if states is None else states
        source = next((kwargs[name] for name in SOURCES if kwargs.get(name) is not None), None)
        keys = self.keys(states if source is None else source, source is not None, kwargs)
        nothing = states.new_zeros(*self.places(states), 0)
        # The projection runs, so that hooks on it do too; its bias is what the layer gives without heads.
        output = nothing if self.headprune_output is None else projected(getattr(self, self.headprune_output), nothing)
        return self.result(output, no_weights(states, keys), args, kwargs)

    def keys(self, states: Tensor, cross: bool, kwargs: dict[str, Any]) -> int:
        """How many keys it would now read, had it heads; a cache counts `states`, which keys are made of. cross: of a decoder's
        attention to its encoder."""
        return count_tokens(self, states, cross, kwargs)

    def places(self, states: Tensor) -> Sequence[int]:
        """The shape of the output for `states` [batch, tokens, features], without the features."""
        return states.shape[:-1]

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for this output [batch, tokens, features] and these attention weights."""
        return output, weights


class EmptiedBloom(Emptied):
    """BLOOM's attention adds the residual itself."""

    hidden_dropout: float

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        residual = kwargs["residual"] if "residual" in kwargs else args[1]
        return residual + F.dropout(output, self.hidden_dropout, self.training), weights


class EmptiedAlbert(Emptied):
    """ALBERT's attention adds the residual and normalises."""

    output_dropout: nn.Module
    LayerNorm: nn.Module

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        residual = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return self.LayerNorm(residual + self.output_dropout(output)), weights


class EmptiedWithBias(Emptied):
    """GPT-NeoX-Japanese hands its output bias on beside the output."""

    dense_bias: Tensor | None

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return output, weights, self.dense_bias


class EmptiedOpenAI(Emptied):
    """The first GPT returns a list, with attention weights in it where they are asked for."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return [output, weights] if kwargs.get("output_attentions") else [output]


class EmptiedAlone(Emptied):
    """Returns its output alone, without attention weights (the vision towers of Qwen, MobileViT)."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return output


class EmptiedPooled(Emptied):
    """Its queries are pooled: of `query_stride` neighbouring tokens (Hiera), or along rows and columns (SAM 2), one is left."""

    query_stride: int | tuple[int, int] | None

    def places(self, states: Tensor) -> Sequence[int]:
        sizes, stride = states.shape[1:-1], self.query_stride or 1
        strides = (stride,) * len(sizes) if isinstance(stride, int) else stride
        return states.shape[0], *(size // step for size, step in zip(sizes, strides))


class EmptiedPooledAlone(EmptiedPooled):
    """And returns its output alone (SAM 2)."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return output


class EmptiedAsAsked(Emptied):
    """Returns attention weights only where they are asked for (ViTDet)."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (output, weights) if kwargs.get("output_attentions") else (output,)


class EmptiedTimm(Emptied):
    """timm's attention returns its output alone."""

    proj_drop: nn.Module

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        dropped: Tensor = self.proj_drop(output)
        return dropped


class EmptiedGraniteSpeech(Emptied):
    """Granite Speech's conformer: its output alone, through its dropout."""

    dropout: nn.Module

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        dropped: Tensor = self.dropout(output)
        return dropped


class EmptiedOnDemand(Emptied):
    """An attention that returns its weights where it is asked for them (ViLT, FLAVA, LayoutLMv3)."""

    headprune_asked_at: int  # where output_attentions stands among the arguments

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        behind = args[self.headprune_asked_at :]
        asked = kwargs.get("output_attentions", behind[0] if behind else False)
        return (output, weights) if asked else (output,)


class EmptiedLinear(NonDynamicallyQuantizableLinear):
    """Quantisers leave it alone: of a weight without elements they would read memory that nobody wrote."""


class EmptiedConv1D(Behaviour):
    """transformers' Conv1D refuses to view inputs of no features."""

    nf: int
    bias: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], self.nf) + self.bias


def projected(layers: nn.Module, states: Tensor) -> Tensor:
    """`states` through a projection: a layer, or (diffusers) a list of a layer and what comes behind it."""
    for layer in layers if isinstance(layers, nn.ModuleList) else [layers]:
        states = layer(states)
    return states


def no_weights(states: Tensor, keys: int) -> Tensor:
    """[batch, 0, queries, keys]: in a model's attention weights the layers behind keep their places. states: as in count_tokens."""
    return states.new_empty(states.shape[0], 0, tokens_in(states), keys)


def tokens_in(states: Tensor) -> int:
    """Of each sample of [batch, tokens, features] or of pictures [batch, rows, columns, features]."""
    return math.prod(states.shape[1:-1])


def count_tokens(module: Any, states: Tensor, cross: bool, kwargs: dict[str, Any]) -> int:
    """Puts a placeholder for each token of `states` [batch, tokens, features] into the layer's cache, where there is one.
    Returns how many keys a layer with heads would now read."""
    cache = next((kwargs[name] for name in CACHES if isinstance(kwargs.get(name), Cache)), None)
    if cache is None or module.layer_idx is None:
        return tokens_in(states)
    if isinstance(cache, EncoderDecoderCache):
        seen = cross and cache.is_updated.get(module.layer_idx)
        if cross:
            cache.is_updated[module.layer_idx] = True
        cache = cache.cross_attention_cache if cross else cache.self_attention_cache
        if seen:
            return length_of(cache.layers[module.layer_idx].keys)
    keys, _ = cache.update(*placeholders(cache, module.layer_idx, states), module.layer_idx)
    return length_of(keys)


def length_of(keys: Tensor) -> int:
    length: int = keys.shape[-2]  # symbolic in a traced graph
    return length


def placeholders(cache: Cache, layer_idx: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """A key and a value of zeros for each token, of the shape that the cache was made for ahead of time."""
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    shapes = [(1, 1), (1, 1)]  # heads, features
    if getattr(layer, "is_initialized", False) and layer.keys.dim() == 4:
        shapes = [(there.shape[1], there.shape[3]) for there in (layer.keys, layer.values)]
    key, value = (states.new_zeros(states.shape[0], heads, states.shape[1], features) for heads, features in shapes)
    return key, value
