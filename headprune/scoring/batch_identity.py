"""By what a batch is known again: a number or a name of all that it holds."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from headprune.errors import InvalidInput


def checksum(batch: Any) -> int:
    """CRC-32 of a batch; of objects that are neither tensors, numbers, text nor containers only their type counts."""
    found = 0
    for part in content(batch, lambda value: type(value).__name__.encode()):
        found = zlib.crc32(part, found)
    return found


def digest(batch: Any) -> str:
    """32 hex digits of a batch, to name a file by. Raises InvalidInput for an object whose content is not known."""
    found = hashlib.sha256()
    for part in content(batch, refused):
        found.update(part)
    return found.hexdigest()[:32]


def content(value: Any, of_others: Callable[[Any], bytes]) -> Iterator[bytes | memoryview]:
    """Tensors and arrays by dtype, shape and bytes, containers by what they hold (mappings in the order of their keys), numbers and
    text as they are, and what `of_others` gives of anything else."""
    if isinstance(value, numpy.ndarray) and value.dtype != object:
        yield f"{value.dtype}{value.shape}".encode()
        yield numpy.ascontiguousarray(value).tobytes()
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        if value.numel():
            yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from content(value[key], of_others)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from content(item, of_others)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        yield repr(value).encode()
    else:
        yield of_others(value)


def refused(value: Any) -> bytes:
    raise InvalidInput(
        f"a batch holds a {type(value).__name__}; expected tensors, arrays, numbers, text and containers of them, by which it is "
        "known again."
    )
