"""headprune.json: digests of what a saved folder holds, so that a load can say which part is off."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headprune.errors import CorruptCheckpoint
from headprune.files import read_json, write_json
from headprune.model_folder import MANIFEST

FILE = MANIFEST
KIND = "headprune_checkpoint"
WEIGHTS = "*.safetensors"
# The parts of config.json that say which heads are left.
SECTIONS = ("headprune", "per_layer_config")
CHUNK = 1 << 20
OTHERWISE = f"Save it again; if you changed it on purpose, pass verify=False, or remove {FILE}."


def write_manifest(folder: Path, digests: Mapping[str, str] | None = None, **content: Any) -> None:
    """Records the weight files of `folder`, those of folders in it (sentence-transformers' dense layers) too, and the head sections
    of its config, beside `content`. digests: file name -> its `file_digest`, where that is known already."""
    known = digests or {}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob(WEIGHTS))}
    with ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(lambda name: known.get(name) or file_digest(files[name]), files)))
    weights = {name: {"bytes": path.stat().st_size, "crc32": found[name]} for name, path in files.items()}
    write_json(folder / FILE, KIND, {**content, "config_sha256": config_digest(folder), "weights": weights})


def mark_exported(folder: Path, target: str) -> None:
    """Says that headprune wrote `folder`, whose weights are for others to read, and to change."""
    write_json(folder / FILE, KIND, {"exported": target, "config_sha256": config_digest(folder), "weights": {}})


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, empty where it has none. Raises CorruptCheckpoint, naming the file, where the folder is not
    what was saved."""
    document = check_config(folder)
    weights: Any = document.get("weights", {})
    entries = list(weights.values()) if isinstance(weights, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("bytes"), int) for entry in entries):
        raise CorruptCheckpoint(f"{folder / FILE} is damaged: its weights are not as they were written. {OTHERWISE}")
    for name, entry in weights.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; the folder was saved with {len(weights)} weight files.")
        if path.stat().st_size != entry["bytes"]:
            raise CorruptCheckpoint(f"{path} has {path.stat().st_size:,} bytes where {entry['bytes']:,} were saved. {OTHERWISE}")
    with ThreadPoolExecutor() as pool:
        for (name, entry), digest in zip(weights.items(), pool.map(file_digest, [folder / name for name in weights])):
            if digest != entry.get("crc32", digest):
                raise CorruptCheckpoint(f"{folder / name} is corrupt: its CRC-32 is not the one that was saved. {OTHERWISE}")
    return document


def check_config(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, empty where it has none. Raises CorruptCheckpoint where the head sections of its config are not
    those that were saved."""
    document = manifest_of(folder)
    if document and document.get("config_sha256") != config_digest(folder):
        raise CorruptCheckpoint(
            f"{folder}/config.json: its sections {' and '.join(SECTIONS)} are not those that were saved. {OTHERWISE}"
        )
    return document


def manifest_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / FILE, KIND) if (folder / FILE).is_file() else {}


def file_digest(path: Path) -> str:
    """CRC-32, as in torch.save's files: it is damage that is to be found, and SHA-256 would take longer than the disk."""
    found, buffer = 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return f"{found:08x}"


def config_digest(folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps([config.get(section) for section in SECTIONS], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
