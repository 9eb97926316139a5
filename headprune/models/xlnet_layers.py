"""XLNet's attention with linear layers. The stock one holds its projections as parameters [features, heads, head_dim]; where heads
are asked for they are the weights of layers, in the same memory, so that gates, scores and cuts reach them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headprune.models.behaviour import Behaviour
from headprune.models.site import Foreign
from headprune.models.specialise import specialise
from headprune.nn.replace import register_own_layers

PARTS = ("q", "k", "v", "r", "o")  # r: of relative positions


def weight_of(part: str) -> property:
    def weight(attention: Foreign) -> Tensor:
        layer: Foreign = attention._modules[f"linear_{part}"]
        found: Tensor = layer.weight.unflatten(1, (attention.n_head, attention.d_head))
        return found

    return property(weight)


class WithLayers(Behaviour):
    """Its forward is the stock one, which reads the layers' weights as its parameters and runs the last of the layers."""

    linear_o: nn.Module
    dropout: nn.Module
    layer_norm: nn.Module
    q, k, v, r, o = (weight_of(part) for part in PARTS)

    def post_attention(self, h: Tensor, attn_vec: Tensor, residual: bool = True) -> Tensor:
        """h: [tokens, batch, features], attn_vec: [tokens, batch, heads, head_dim]. The layer sees [batch, tokens, features]."""
        output = self.dropout(self.linear_o(attn_vec.transpose(0, 1).flatten(2)).transpose(0, 1))
        normed: Tensor = self.layer_norm(output + h if residual else output)
        return normed


def is_xlnet(module: nn.Module) -> bool:
    return isinstance(module, WithLayers) or all(getattr(module._parameters.get(part), "ndim", 0) == 3 for part in PARTS)


def layers_of(module: Foreign) -> dict[str, Foreign]:
    """Part -> its layer; of a stock attention one made for the question, over the same memory."""
    if isinstance(module, WithLayers):
        return {part: module._modules[f"linear_{part}"] for part in PARTS}
    return {part: layer_over(module._parameters[part], part == "o") for part in PARTS}


def layer_over(parameter: nn.Parameter, output: bool) -> Foreign:
    with torch.device("meta"):
        features, width = parameter.shape[0], parameter[0].numel()
        layer: Foreign = nn.Linear(width, features, bias=False) if output else Conv1D(width, features)
    layer.weight = nn.Parameter(parameter.data.flatten(1), requires_grad=parameter.requires_grad)
    layer.weight.grad = None if parameter.grad is None else parameter.grad.flatten(1)
    layer.bias = None
    return layer


@register_own_layers
def with_layers(module: Foreign) -> Callable[[], None] | None:
    if isinstance(module, WithLayers) or not is_xlnet(module):
        return None
    stock, parameters, layers = type(module), dict(module._parameters), layers_of(module)
    specialise(module, WithLayers)
    for part, layer in layers.items():
        del module._parameters[part]
        module._modules[f"linear_{part}"] = layer

    def undo() -> None:
        module.__class__ = stock
        for part in PARTS:
            weight: Foreign = module._modules.pop(f"linear_{part}").weight
            parameters[part] = put_back(parameters[part], weight, (module.n_head, module.d_head))
        own = {name: parameters[name] if name in PARTS else module._parameters[name] for name in parameters}
        module._parameters.clear()
        module._parameters.update(own)

    return undo


def put_back(parameter: nn.Parameter, weight: nn.Parameter, heads: tuple[int, int]) -> nn.Parameter:
    """`parameter` as `weight` left it; another one where heads are gone."""
    data = weight.data.unflatten(1, heads)
    if data.shape != parameter.shape:
        return nn.Parameter(data, requires_grad=weight.requires_grad)
    parameter.data = data
    parameter.requires_grad_(weight.requires_grad)
    parameter.grad = None if weight.grad is None else weight.grad.unflatten(1, heads)
    return parameter
