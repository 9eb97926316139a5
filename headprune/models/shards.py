"""The weights of a model folder, read one tensor at a time: no file is mapped, and none is read further than asked."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.files import parsed_json

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEADER_LIMIT = 100_000_000  # the format's own
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file, the offset of its first byte there, and how it is to be read."""

    path: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shards(Mapping[str, Stored]):
    """Tensor name -> Stored, over all weight files of `folder`, in the order of the files. metadata: file name -> its own."""

    folder: Path
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the first weight by file and name, as transformers has it where the config does not say; fp32 where none is."""
        in_order = sorted(self.tensors.items(), key=lambda item: (item[1].path, item[0]))
        dtypes = (DTYPES[stored.dtype] for _, stored in in_order)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    @property
    def files(self) -> list[str]:
        return list(self.metadata)

    def sizes(self) -> dict[str, list[int]]:
        """File name -> its size and when it was last written (nanoseconds), of the config its size and CRC-32: what tells one model
        from another."""
        found = {file: (self.folder / file).stat() for file in self.files}
        config = (self.folder / CONFIG).read_bytes()
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in found.items()} | {
            CONFIG: [len(config), zlib.crc32(config)]
        }

    def read(self, name: str, pinned: bool = False) -> Tensor:
        return read_stored(self.tensors[name], pinned)


def read_stored(stored: Stored, pinned: bool = False) -> Tensor:
    """The tensor, on the CPU, in memory of its own; pinned: memory that a GPU copies from by itself."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=pinned)
    with opened(stored.path) as file:
        file.seek(stored.start)
        fill(file, raw.numpy().data, stored.path)
    return raw.view(DTYPES[stored.dtype]).view(stored.shape)


def opened(path: Path) -> io.FileIO:
    """A weight file whose header was read before."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read any more: {os.strerror(error.errno or 0)}.") from None


def fill(file: io.RawIOBase, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise CorruptCheckpoint(f"{path} ended {len(view) - done:,} bytes early while it was read; was it changed?")
        done += got


def open_shards(folder: str | os.PathLike[str]) -> Shards:
    """Reads the headers of all weight files of `folder`, and nothing else.

    Raises InvalidInput where there are none, CorruptCheckpoint, naming the file, where one is missing, cut short, not in the
    format, or lacks a tensor that the index promises to be there.
    """
    folder = Path(folder)
    promised = index_of(folder)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in sorted(set(promised.values())) if promised else [SINGLE]:  # of a tensor in two files transformers takes the last
        path = folder / file
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; {INDEX} names it. Download or save the folder again.")
        found, metadata[file] = header_of(path)
        lacking = [name for name, where in promised.items() if where == file and name not in found]
        if lacking:
            raise CorruptCheckpoint(f"{path} lacks {lacking[0]}, which {INDEX} says is there. Save the folder again.")
        tensors |= found
    return Shards(folder, tensors, metadata)


def index_of(folder: Path) -> dict[str, str]:
    """Tensor name -> file; empty where one file holds all."""
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        raise InvalidInput(f"{folder} holds neither {SINGLE} nor {INDEX}; give a model folder with safetensors weights.")
    try:
        found = dict(parsed_json((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        if not found or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("no names of files")
        return found
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{folder / INDEX} is no index of weights: {error!r}.") from None


def header_of(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What a safetensors file says that it holds, checked against its size; and its metadata."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CorruptCheckpoint(f"{path} is no safetensors file, or was cut short ({size:,} bytes).")
        text = file.read(length)
    try:
        entries = parsed_json(text)
        metadata = entries.pop("__metadata__", {})
        found = {name: stored_at(path, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} has a header that cannot be read: {error!r}.") from None
    expected = max((stored.start + stored.nbytes for stored in found.values()), default=8 + length)
    if size != expected:
        raise CorruptCheckpoint(f"{path} has {size:,} bytes where its header promises {expected:,}. Download or save it again.")
    return dict(sorted(found.items(), key=lambda item: item[1].start)), metadata


def stored_at(path: Path, base: int, entry: Mapping[str, Any]) -> Stored:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    expected = torch.Size(shape).numel() * DTYPES[entry["dtype"]].itemsize
    if stop - start != expected:
        raise ValueError(f"{stop - start} bytes for {entry['dtype']} {list(shape)}")
    return Stored(path, base + start, expected, entry["dtype"], shape)
