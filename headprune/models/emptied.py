"""An attention that has lost all its heads: it adds its output bias alone, and its cache still counts tokens.

transformers reads the length of the past from the cache of one layer (the first of its kind), so an emptied layer keeps a
placeholder there: one key and one value of one feature per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from headprune.models.site import Foreign, is_conv1d
from headprune.models.specialise import Behaviour, specialise

CACHES = ("past_key_values", "past_key_value", "layer_past")
SOURCES = ("encoder_hidden_states", "key_value_states")


def empty(module: Foreign, output: str | None, behaviour: type | None = None) -> None:
    """Makes `module`, whose projections hold no head any more, a no-op.

    output: the attribute of its output projection; None where `module` returns what a sibling then projects.
    behaviour: a subclass of Emptied with another `result`.
    """
    module.headprune_output = output
    if output is not None and is_conv1d(getattr(module, output)):
        specialise(getattr(module, output), EmptiedConv1D)
    specialise(module, behaviour or Emptied)


class Emptied(Behaviour):
    """The forward of an attention module without heads. What the module would return beside its output is None."""

    headprune_output: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        source = next((kwargs[name] for name in SOURCES if kwargs.get(name) is not None), None)
        count_tokens(self, states if source is None else source, source is not None, kwargs)
        nothing = states.new_zeros(*states.shape[:-1], 0)
        # The projection runs, so that hooks on it do too; its bias is what the layer gives without heads.
        output = nothing if self.headprune_output is None else getattr(self, self.headprune_output)(nothing)
        return self.result(output, args, kwargs)

    def result(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for this output [batch, tokens, features]."""
        return output, None


class EmptiedConv1D(Behaviour):
    """transformers' Conv1D refuses to view inputs of no features."""

    nf: int
    bias: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], self.nf) + self.bias


def count_tokens(module: Foreign, states: Tensor, cross: bool, kwargs: dict[str, Any]) -> None:
    """Puts a placeholder for each token of `states` [batch, tokens, features] into the layer's cache, where there is one."""
    cache = next((kwargs[name] for name in CACHES if isinstance(kwargs.get(name), Cache)), None)
    if cache is None or module.layer_idx is None:
        return
    if isinstance(cache, EncoderDecoderCache):
        if cross and cache.is_updated.get(module.layer_idx):
            return
        if cross:
            cache.is_updated[module.layer_idx] = True
        cache = cache.cross_attention_cache if cross else cache.self_attention_cache
    placeholder = states.new_zeros(states.shape[0], 1, states.shape[1], 1)
    cache.update(placeholder, placeholder.clone(), module.layer_idx)
