"""By what a batch is known again: a number or a name of all that it holds."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.models.batches import length_of


def checksum(batch: Any) -> int:
    """CRC-32 of a batch; of objects that are neither tensors, numbers, text, dataclasses nor containers only their type counts."""
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


def data_identity(data: Any) -> str | None:
    """What tells training data from others: the content of a list or tuple of batches; of anything else its type and, where it
    knows it, its length."""
    if data is None:
        return None
    if isinstance(data, (list, tuple)):
        return f"{len(data)} batches {hashlib.sha256(repr([checksum(batch) for batch in data]).encode()).hexdigest()[:16]}"
    length = length_of(data)
    return f"{type(data).__qualname__} of {'unknown' if length is None else length} batches"


def content(value: Any, of_others: Callable[[Any], bytes]) -> Iterator[bytes | memoryview]:
    """Tensors and arrays by dtype, shape and bytes, containers by their length and what they hold (mappings in the order of their
    keys), dataclasses as mappings, numbers and text as they are, and what `of_others` gives of anything else. No two contents
    give the same bytes: each part says where it ends."""
    if isinstance(value, numpy.ndarray) and value.dtype != object:
        yield f"{value.dtype}{value.shape}".encode()
        yield numpy.ascontiguousarray(value).tobytes()
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        if value.numel():
            yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"mapping{len(value)}:".encode()
        for key in sorted(value, key=repr):
            yield plain(key)
            yield from content(value[key], of_others)
    elif isinstance(value, (list, tuple)):
        yield f"sequence{len(value)}:".encode()
        for item in value:
            yield from content(item, of_others)
    elif is_dataclass(value) and not isinstance(value, type):
        yield plain(type(value).__name__)
        yield from content({field.name: getattr(value, field.name) for field in fields(value)}, of_others)
    elif isinstance(value, numpy.generic):
        yield from content(numpy.asarray(value), of_others)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        yield plain(value)
    else:
        yield of_others(value)


def plain(value: Any) -> bytes:
    shown = repr(value).encode()
    return f"{len(shown)}:".encode() + shown


def refused(value: Any) -> bytes:
    raise InvalidInput(
        f"a batch holds a {type(value).__name__}; expected tensors, arrays, numbers, text, and containers or dataclasses of "
        "them, by which it is known again."
    )
