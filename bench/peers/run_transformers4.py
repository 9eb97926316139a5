"""transformers 4: heads ranked as its example did (Michel 2019: |gradient| of head_mask over each layer's norm)."""

import torch
from child import Request, main


def score(model, request: Request):
    """[layers, heads]"""
    mask = torch.ones(model.config.num_hidden_layers, model.config.num_attention_heads, requires_grad=True)
    total = torch.zeros_like(mask)
    masked = lambda **batch: model(**batch, head_mask=mask)  # noqa: E731
    for batch in request.calibration:
        (gradient,) = torch.autograd.grad(request.loss(masked, batch), mask)
        total += gradient.abs()
    return total / total.norm(dim=1, keepdim=True)


def cut(model, scored, request: Request):
    """The lowest of all layers; prune_heads leaves at least one where all would go."""
    layers, heads = scored.shape
    gone = scored.flatten().argsort()[: int(request.heads * scored.numel() + 1e-9)].tolist()
    by_layer = {layer: {index % heads for index in gone if index // heads == layer} for layer in range(layers)}
    for layer, some in by_layer.items():
        if len(some) == heads:
            raise ValueError(f"layer {layer} would lose all its heads, which prune_heads cannot do")
    model.prune_heads({layer: sorted(some) for layer, some in by_layer.items() if some})
    return model


main(score, cut)
