"""N:M sparsity by magnitude: 2:4 (Mishra et al. 2021) and 4:8 (Zhou et al. 2021), through torch.ao.pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from headprune.comparison.masks import WEIGHT
from headprune.comparison.method import Compressed, Refused, Subject, comparison_method
from headprune.comparison.sizes import bitmask_bits, two_of_four_bits
from headprune.models.site import Foreign, is_conv1d
from headprune.recovery.methods import linear_layers


@comparison_method(
    "semi-structured", label="2:4 weights", kind="sparsity", granularity="weights, in fours", library="torch",
    kernels="2:4 sparse matrix products (sparse tensor cores, sm_80 and later)",
)  # fmt: skip
def semi_structured(subject: Subject) -> Compressed:
    """Zeroes two of every four weights along the inputs, in as many linear layers as it takes to zero what head pruning removes:
    those that lose the smallest share of their energy."""
    found = half_zeroed(subject, 4)
    return replace(found, stored_bits=two_of_four_bits, compact="computed: the values that stay and 2 bits for the place of each")


@comparison_method(
    "four-of-eight", label="4:8 weights", kind="sparsity", granularity="weights, in eights", library="torch",
    kernels="4:8 sparse matrix products, which no tensor core has",
)  # fmt: skip
def four_of_eight(subject: Subject) -> Compressed:
    """As 2:4 with blocks of eight, which leaves more patterns to choose from."""
    found = half_zeroed(subject, 8)
    return replace(found, stored_bits=bitmask_bits, compact="computed: a bit for each weight and the values that stay")


def half_zeroed(subject: Subject, block: int) -> Compressed:
    """A copy with half of every `block` weights along the inputs zeroed, in as many layers as the budget pays for."""
    model = subject.copy()
    modules: dict[str, Foreign] = {name: model.get_submodule(name) for name in linear_layers(model)}
    fitting = {name: module for name, module in modules.items() if not is_conv1d(module) and module.in_features % block == 0}
    chosen = affordable({name: module.weight.detach() for name, module in fitting.items()}, subject.removed, block)
    masks = sparsified(model, chosen, block)
    zeroed = sum(int((~mask).sum()) for mask in masks.values())
    note = f"{len(masks)} of {len(modules)} linear layers; {zeroed:,} weights of the {subject.removed:,} asked for"
    return Compressed(model, note, masks)


def affordable(weights: Mapping[str, Tensor], budget: int, block: int) -> list[str]:
    """Whole layers, in order of the share of their energy that is lost, as long as they fit into `budget` zeros."""
    pattern = f"{block // 2}:{block}"
    if not weights:
        raise Refused(f"{pattern} fits none of its linear layers: they are Conv1D, or have inputs that are no multiple of {block}")
    halves = {name: weight.numel() // 2 for name, weight in weights.items()}
    if budget > sum(halves.values()):
        raise Refused(
            f"{budget:,} weights are to go; {pattern} can take {sum(halves.values()):,}, half of the {len(halves)} layers it fits"
        )
    chosen, left = [], budget
    for name in sorted(weights, key=lambda name: lost_energy(weights[name], block)):
        if halves[name] <= left:
            chosen.append(name)
            left -= halves[name]
    if not chosen:
        raise Refused(f"{budget:,} weights are to go; {pattern} takes half of a layer, at least {min(halves.values()):,}")
    return chosen


def lost_energy(weight: Tensor, block: int) -> float:
    """Share of the sum of squares in the smaller half of every `block` neighbours."""
    squares = weight.double().square().view(-1, block)
    return float(squares.topk(block // 2, dim=1, largest=False).values.sum() / squares.sum().clamp_min(1e-300))


def sparsified(model: nn.Module, names: list[str], block: int) -> dict[str, Tensor]:
    """Zeroes the weights of these layers in place; the masks of what stays."""
    from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, block), zeros_per_block=block // 2)
    sparsifier.prepare(model, config=[{"tensor_fqn": f"{name}.{WEIGHT}"} for name in names])
    sparsifier.step()
    modules: dict[str, Foreign] = {name: model.get_submodule(name) for name in names}
    masks: dict[str, Tensor] = {name: module.parametrizations.weight[0].mask.bool().clone() for name, module in modules.items()}
    sparsifier.squash_mask()
    for mask in masks.values():
        assert bool(torch.all(mask.view(-1, block).sum(dim=1) == block // 2))
    return masks
