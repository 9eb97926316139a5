"""The states of all calibration batches between layers: in memory, or on disk, where they outlive a crash."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.files import read_json, whole_file, write_json

CLAIM = "run.json"


class LayerStates:
    """(kind, layer, batch) -> a tensor on the CPU. kind: "states" enter a layer, "gradients" come back to it.

    folder: None keeps them in memory; else one file each, written whole or not at all.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[tuple[str, int, int], Tensor] = {}

    def put(self, kind: str, layer: int, batch: int, states: Tensor) -> None:
        states = states.detach().cpu()
        if self.folder is None:
            self._kept[kind, layer, batch] = states
            return
        with whole_file(self._path(kind, layer, batch)) as draft:
            save_file({"states": states.contiguous()}, draft)

    def get(self, kind: str, layer: int, batch: int) -> Tensor:
        if self.folder is None:
            return self._kept[kind, layer, batch]
        return load_file(self._path(kind, layer, batch))["states"]

    def has(self, kind: str, layer: int, batch: int) -> bool:
        return (kind, layer, batch) in self._kept if self.folder is None else self._path(kind, layer, batch).exists()

    def drop(self, kind: str, layer: int) -> None:
        """Forgets what is kept of `kind` at `layer`."""
        self._kept = {key: states for key, states in self._kept.items() if key[:2] != (kind, layer)}
        if self.folder is not None:
            shutil.rmtree(self.folder / kind / f"{layer:05d}", ignore_errors=True)

    def _path(self, kind: str, layer: int, batch: int) -> Path:
        assert self.folder is not None  # else the states are kept in memory
        return self.folder / kind / f"{layer:05d}" / f"{batch:06d}.safetensors"


def take_over(folder: Path, kind: str, content: dict[str, Any]) -> None:
    """Makes `folder` that of the run that `content` describes: what lies there under the same claim stays, but for what was only
    half written; anything else is thrown away, also what has no claim (half thrown away itself)."""
    if (folder / CLAIM).exists() and claim(folder, kind, content) is None:
        for half_written in list(folder.rglob(".*")):
            if half_written.is_dir():
                shutil.rmtree(half_written)
            else:
                half_written.unlink(missing_ok=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    claim(folder, kind, content)


def claim(folder: Path, kind: str, content: dict[str, Any]) -> str | None:
    """Marks `folder` as that of the run that `content` describes (plain JSON values). Where another run of this kind lies there,
    the first key in which it differs."""
    path = folder / CLAIM
    if not path.exists():
        write_json(path, kind, content)
        return None
    try:
        document = read_json(path, kind)
    except InvalidInput as error:
        raise InvalidInput(f"{error} Remove {folder} to start again: what an earlier try has done there is then lost.") from None
    return next((key for key, value in content.items() if document.get(key) != value), None)
