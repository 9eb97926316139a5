"""The copy that surgery is: entries of a tensor along one dimension into new memory, in blocks as long as they come; on a GPU those
of all tensors of a layer in one launch.

A large result lies in memory that the process touches for the first time, page by page, which takes longer than the copy; on
Linux it therefore asks for huge pages, as PyTorch's own CPU allocator does under THP_MEM_ALLOC_ENABLE=1.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2**21
LARGE = 2**25  # bytes; smaller blocks the C library takes out of memory that it has, once there is some
MADV_HUGEPAGE = 14  # linux/mman.h


Request = tuple[Tensor, int, Tensor]  # arguments of `gathered`


def gathered_at_once(requests: Sequence[Request]) -> list[Tensor] | None:
    """`gathered` of each request in one launch; None where they do not all lie on one CUDA device, contiguous."""
    devices = {tensor.device for tensor, _, _ in requests}
    plain = all(tensor.is_contiguous() for tensor, _, _ in requests)
    if len(devices) != 1 or devices.pop().type != "cuda" or not plain or not importlib.util.find_spec("triton"):
        return None
    return launched(requests)


def launched(requests: Sequence[Request]) -> list[Tensor]:
    from headprune.kernels.gather_heads import Gather, gather_launch

    found, gathers = [], []
    for tensor, dim, entries in requests:
        target = tensor.new_empty((*tensor.shape[:dim], len(entries), *tensor.shape[dim + 1 :]))
        found.append(target)
        if target.numel():
            block, inner = block_of(entries, tensor.shape[dim]), tensor.shape[dim + 1 :].numel()
            gathers.append(Gather(tensor, target, tensor.shape[:dim].numel(), entries[::block] // block, block * inner))
    if gathers:
        gather_launch(gathers).run()
    return found


def gathered(tensor: Tensor, dim: int, entries: Tensor) -> Tensor:
    """tensor.index_select(dim, entries), contiguous; entries: int64 on the CPU, ascending."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not entries.numel():
        return tensor.index_select(dim, entries.to(tensor.device))
    out = fresh([*tensor.shape[:dim], len(entries), *tensor.shape[dim + 1 :]], tensor.dtype)
    if dim == 0:
        return torch.index_select(tensor, 0, entries, out=out)
    # Columns one by one would be slow: blocks of them, in the order in which they lie in memory.
    block, inner = block_of(entries, tensor.shape[dim]), tensor.shape[dim + 1 :].numel()
    blocks_in_row = tensor.shape[dim] // block
    chosen = torch.arange(tensor.shape[:dim].numel(), device="cpu")[:, None] * blocks_in_row + entries[::block] // block
    torch.index_select(tensor.view(-1, block * inner), 0, chosen.flatten(), out=out.view(-1, block * inner))
    return out


def block_of(entries: Tensor, length: int) -> int:
    """The largest block that `entries` consists of: aligned runs of so many neighbours, in a dimension of `length`."""
    numbers = entries.numpy()
    starts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return int(np.gcd.reduce([length, len(numbers), numbers[0], *starts, *numbers[starts]]))


def fresh(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Empty CPU memory, where it is large in huge pages if the system gives them on request."""
    out = torch.empty(shape, dtype=dtype, device="cpu")  # where a model is built on another device too
    if out.nbytes < LARGE or sys.platform != "linux":
        return out
    start = -(-out.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (out.data_ptr() + out.nbytes) // HUGE_PAGE * HUGE_PAGE - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)  # a refusal does no harm
    return out
