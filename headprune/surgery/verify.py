"""Proof that a pruned model is what its plan says: cutting heads must equal gating them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models import attention_sites, gated
from headprune.models.site import Foreign, is_conv1d
from headprune.nn.replace import own_attention


@torch.no_grad()
def gated_twin(dense: nn.Module, pruned: nn.Module, keep: Mapping[str, Sequence[int]], resolved: Iterable[str] = ()) -> nn.Module:
    """A copy of `dense` that carries the output projections of `pruned` in the columns of the kept heads, and its linear layers
    `resolved` (names of feed-forward ends that compensation changed) as they are.

    Under `gated(twin, keep)` it must give exactly what `pruned` gives, compensated or not.
    """
    twin = copy.deepcopy(dense)
    with own_attention(twin, keep=True), own_attention(pruned):  # what is written to the twin stays in it
        small = {site.name: site for site in attention_sites(pruned)}
        for site in attention_sites(twin):
            columns = site.columns(tuple(keep[site.name]))
            for output, pruned_output in zip(site.outputs, small[site.name].outputs, strict=True):
                module, source = output.module, pruned_output.module
                module.weight.data.index_copy_(0 if is_conv1d(module) else 1, columns.to(module.weight.device), source.weight.data)
                if module.bias is not None:
                    module.bias.data.copy_(source.bias.data)
    for name in resolved:
        twin.get_submodule(name).load_state_dict(pruned.get_submodule(name).state_dict())
    return twin


def cut_error(
    dense: nn.Module,
    pruned: nn.Module,
    keep: Mapping[str, Sequence[int]],
    run: Callable[[nn.Module], Tensor],
    resolved: Iterable[str] = (),
) -> float:
    """Largest absolute difference between `run(pruned)` and the same model with its removed heads gated to zero instead,
    relative to the largest absolute value. resolved: as for `gated_twin`."""
    twin = gated_twin(dense, pruned, keep, resolved)
    with gated(twin, keep):
        expected = run(twin)
    return relative_difference(run(pruned), expected)


def same_tokens(
    dense: nn.Module,
    pruned: nn.Module,
    keep: Mapping[str, Sequence[int]],
    prompt: Any,
    tokens: int = 32,
    resolved: Iterable[str] = (),
) -> bool:
    """Whether greedy generation with a cache gives the same tokens cut and gated; `prompt` is what `generate` takes. resolved: as
    for `gated_twin`."""
    twin: Foreign = gated_twin(dense, pruned, keep, resolved)
    cut: Foreign = pruned
    options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    with gated(twin, keep):
        expected = twin.generate(**prompt, **options)
    return bool(torch.equal(cut.generate(**prompt, **options), expected))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)
