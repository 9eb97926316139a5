"""Writes a safetensors file tensor by tensor: what stays as it is goes from file to file, and no shard is held in memory."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headprune.errors import CorruptCheckpoint, HeadpruneError
from headprune.files import whole_file
from headprune.models.shards import DTYPES, Stored, opened

CHUNK = 1 << 24
ALIGNMENT = 8  # of the header, as the format asks


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its stored type and shape, and where it comes from: a file, or a call that makes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Stored | Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


def write_shard(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
    """All of the file or nothing, unless the machine itself goes down: whoever goes on after that compares digests. Raises
    HeadpruneError where the disk refuses, or a tensor is not as its entry says."""
    entries = list(entries)
    # "r+b": ext4 writes a file that was opened with truncation to the disk when it is closed.
    with whole_file(path, sync=False) as draft, draft.open("r+b", buffering=0) as file:
        write_all(file, memoryview(header(entries, metadata)))
        for entry in entries:
            if isinstance(entry.content, Stored):
                copy_range(entry.content, file.fileno())
            else:
                write_all(file, bytes_of(entry, entry.content()))


def header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        content[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def bytes_of(entry: Entry, made: Tensor) -> memoryview:
    tensor = made.detach().cpu().contiguous()
    if tensor.dtype != DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
        raise HeadpruneError(
            f"{entry.name} became {tensor.dtype} {list(tensor.shape)}; expected {entry.dtype} {list(entry.shape)}."
        )
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_all(file: io.RawIOBase, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:]) or 0


def copy_range(stored: Stored, target: int) -> None:
    """Appends the bytes of `stored` to the open file `target`."""
    with opened(stored.path) as source:
        done = 0
        while done < stored.nbytes:
            copied = copy_some(source, target, stored.start + done, min(CHUNK, stored.nbytes - done))
            if not copied:
                raise CorruptCheckpoint(f"{stored.path} ended early while it was copied; was it changed?")
            done += copied


def copy_some(source: io.FileIO, target: int, start: int, count: int) -> int:
    """How many bytes went over: inside the kernel on Linux; elsewhere sendfile takes sockets alone, or is not there."""
    if sys.platform == "linux":
        return os.sendfile(target, source.fileno(), start, count)
    source.seek(start)
    return os.write(target, source.read(count))
