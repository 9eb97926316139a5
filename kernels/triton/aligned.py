"""Copies against a miscompilation, seen on an H200 (bench/NOTES.md): on Hopper, in 16-bit types, Triton 3.6 multiplies what it
holds in registers (the probabilities) wrongly with a matrix in two tiles whose rows may begin anywhere, which it does not load
asynchronously then. The interpreter, fp32, single tiles and rows at multiples of 16 elements are right. Such tensors are rare (a
head_dim of 33 to 120 that is no multiple of 16, views with odd strides) and slow to load anyway.
"""

from __future__ import annotations

from torch import Tensor

from headprune.kernels.launch import capability_of
from headprune.kernels.scores import split_dim


def concerned(tensor: Tensor) -> bool:
    """Whether kernels that run on the device and the dtype of `tensor` need `aligned`."""
    return capability_of(tensor.device) == 90 and tensor.element_size() == 2


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of one last dimension, as they are if that fits one tile or all of their rows are regular; else contiguous
    copies, with columns of zeros behind them that fill the second tile."""
    dim = tensors[0].shape[-1]
    first, second = split_dim(dim)
    if not second or all(regular(tensor) and first + second == dim for tensor in tensors):
        return tensors
    wide = tuple(tensor.new_zeros((*tensor.shape[:-1], first + second)) for tensor in tensors)
    for copy, tensor in zip(wide, tensors):
        copy[..., :dim] = tensor
    return wide


def regular(tensor: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 elements of aligned memory, as Triton can see from the strides."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


def narrowed(tensor: Tensor | None, dim: int) -> Tensor | None:
    """The first `dim` columns."""
    return tensor if tensor is None or tensor.shape[-1] == dim else tensor[..., :dim].contiguous()
