"""Swaps every torch.nn.MultiheadAttention of a model for a VariableHeadAttention with the same weights."""

from __future__ import annotations

from torch import nn

from headprune.nn.attention import VariableHeadAttention


def replace_multihead_attention(model: nn.Module) -> nn.Module:
    """`model` with VariableHeadAttention in place of every torch.nn.MultiheadAttention, in place; the outputs stay the same.

    A layer that stands in several places stays shared. Subclasses are left alone: their forward may be another. Where
    `model` itself is such a layer the new one is returned. An optimizer made before holds the old parameters.
    """
    swapped: dict[int, VariableHeadAttention] = {}

    def swap(layer: nn.Module) -> VariableHeadAttention:
        if id(layer) not in swapped:
            swapped[id(layer)] = VariableHeadAttention.from_torch(layer)
        return swapped[id(layer)]

    if type(model) is nn.MultiheadAttention:
        return swap(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children() leaves out a second name of a shared layer
            if type(child) is nn.MultiheadAttention:
                setattr(module, name, swap(child))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(type(part) is VariableHeadAttention for part in module.modules()):
            module.use_nested_tensor = False  # else padded batches reach the layers as nested tensors, for torch's own kernel
    return model
