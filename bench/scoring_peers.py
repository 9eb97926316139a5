"""What scoring is measured against: a plain backward pass, head masks with autograd, Torch-Pruning's Taylor importance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from headprune.models import attention_sites
from headprune.scoring.observe import frozen

Batch = dict[str, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """[samples], of the last hidden state, so that no head of the model and no vocabulary counts."""
    return model(**batch).last_hidden_state.float().square().mean(dim=(1, 2))


def plain_backward(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Forward and backward with frozen weights: the gradient goes through every layer, from the embeddings on."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    with frozen(model):
        for batch in batches:
            loss_of(model, batch).sum().backward()
    handle.remove()


def head_mask_backward(model: nn.Module, batches: Sequence[Batch]) -> None:
    """As transformers 4 did it: a mask of ones on every head's output, weights that ask for gradients, as they do by default."""
    with ExitStack() as stack:
        for site in attention_sites(model):
            weight = site.output.module.weight
            mask = torch.ones(site.head_map.query_heads, dtype=weight.dtype, device=weight.device, requires_grad=True)
            columns = site.head_of_column().to(weight.device)
            hook = lambda _module, args, mask=mask, columns=columns: (args[0] * mask[columns], *args[1:])  # noqa: E731
            stack.callback(site.output.module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            loss_of(model, batch).mean().backward()
    model.zero_grad(set_to_none=True)


def torch_pruning_taylor(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], list[Tensor]]:
    """Torch-Pruning's Taylor importance of every attention: gradients of all weights, then its scores of each group. Its graph of
    the model is made once, here, and does not count."""
    from quality.torch_pruning_heads import head_pruner

    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # what its tracing reads
    pruner = head_pruner(model, {name: rows[:1] for name, rows in batches[0].items()}, 0.5)
    model.set_attn_implementation("sdpa")
    groups = list(pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types))
    groups = [pruner._downstream_node_as_root_if_attention(group) for group in groups]

    def importance() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            loss_of(model, batch).mean().backward()
        return [pruner.importance(group) for group in groups]

    return importance
