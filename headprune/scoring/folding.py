"""A batch taken several times over: the tensors that models take and return, folded along their batch dimension.

Such values are trees (tuples, dicts, transformers' outputs) of tensors. A fold lays the whole batch several times one after
the other. Which dimension of a tensor is the batch is seen, not guessed: it is the one that doubles when the batch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Dims = tuple[int | None, ...]  # the batch dimension of each leaf of a tree; None: it is the same for any batch

PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
FOREIGN = "foreign"  # stands for a leaf that is neither a tensor nor plain: what it holds is not known
NOT_OF_A_BATCH = ("cache_position",)  # arguments as long as the sequence, which may be as long as the batch by chance


def shapes(tree: Any) -> tuple[Any, ...]:
    """Of each leaf: its shape, None where it is plain, or FOREIGN."""
    leaves = tree_flatten(tree)[0]
    return tuple(leaf.shape if isinstance(leaf, Tensor) else None if isinstance(leaf, PLAIN) else FOREIGN for leaf in leaves)


def batch_dims(single: tuple[Any, ...], doubled: tuple[Any, ...]) -> Dims | None:
    """From the `shapes` of a tree and of the same one for the doubled batch; None where they do not differ so."""
    if len(single) != len(doubled):
        return None
    dims: list[int | None] = []
    for one, two in zip(single, doubled):
        if one == two:
            dims.append(None)
            continue
        if not (isinstance(one, torch.Size) and isinstance(two, torch.Size)) or len(one) != len(two):
            return None
        changed = [dim for dim in range(len(one)) if one[dim] != two[dim]]
        if len(changed) != 1 or two[changed[0]] != 2 * one[changed[0]]:
            return None
        dims.append(changed[0])
    return tuple(dims)


def argument_dims(args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int) -> Dims | None:
    """The batch dimensions of a call's tensors, if the first tensor's is `batch_dim`; to be confirmed by a doubled call."""
    outside = {id(kwargs[name]) for name in NOT_OF_A_BATCH if name in kwargs}
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in outside]
    if not tensors or tensors[0].dim() <= batch_dim:
        return None
    samples = tensors[0].shape[batch_dim]

    def dim_of(leaf: Any) -> int | None:
        if not isinstance(leaf, Tensor) or id(leaf) in outside:
            return None
        return next((dim for dim in (batch_dim, 0) if leaf.dim() > dim and leaf.shape[dim] == samples), None)

    return tuple(dim_of(leaf) for leaf in leaves)


def batch_size(tree: Any, dims: Dims) -> int:
    sizes: Iterator[int] = (leaf.shape[dim] for leaf, dim in zip(tree_flatten(tree)[0], dims) if dim is not None)
    return next(sizes)


def folded(tree: Any, dims: Dims, times: int) -> Any:
    """`tree` for the batch taken `times` times."""
    leaves, form = tree_flatten(tree)
    return tree_unflatten([leaf if dim is None else tiled(leaf, dim, times) for leaf, dim in zip(leaves, dims)], form)


def tiled(tensor: Tensor, dim: int, times: int) -> Tensor:
    """[.., n, ..] -> [.., times * n, ..]; a copy, as models take views of their tensors and change them in place."""
    return torch.cat([tensor] * times, dim)


def fold(tree: Any, dims: Dims, times: int, index: int) -> Any:
    """One of the `times` folds of a result. Single numbers, which are of all folds together (a mean loss), become None."""
    leaves, form = tree_flatten(tree)
    own = [None if isinstance(leaf, Tensor) and leaf.dim() == 0 else leaf for leaf in leaves]
    return tree_unflatten([part(leaf, dim, times, index) for leaf, dim in zip(own, dims)], form)


def first_sample(tree: Any, dims: Dims) -> Any:
    """`tree` for the first sample of its batch alone."""
    leaves, form = tree_flatten(tree)
    samples = batch_size(tree, dims)
    return tree_unflatten([part(leaf, dim, samples, 0) for leaf, dim in zip(leaves, dims)], form)


def part(leaf: Any, dim: int | None, times: int, index: int) -> Any:
    if dim is None:
        return leaf
    size = leaf.shape[dim] // times
    return leaf.narrow(dim, index * size, size)


def alike(found: Any, times: int, index: int, expected: Any, dims: Dims, tolerance: float) -> bool:
    """Whether one of the `times` folds of `found` holds the same tensors of a batch as `expected`, but for rounding:
    `tolerance` of the largest entry of each. False where there is no tensor of a batch to compare."""
    mine, theirs = tree_flatten(found)[0], tree_flatten(expected)[0]
    if len(mine) != len(theirs) or all(dim is None for dim in dims):
        return False
    for one, two, dim in zip(mine, theirs, dims):
        if dim is None:
            continue
        one = part(one, dim, times, index)
        if one.shape != two.shape:
            return False
        one, two = one.detach().double().nan_to_num(), two.detach().double().nan_to_num()
        if two.numel() and bool((one - two).abs().max() > tolerance * two.abs().max()):
            return False
    return True
