"""The files of a model folder that are neither weights nor config: tokenizer, processor, templates, pooling, licences."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from headprune.errors import InvalidInput
from headprune.files import whole_file
from headprune.hub import known_folder
from headprune.model_folder import COMPANIONS


def origin_of(model: nn.Module, source: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with the files that belong to `model`: `source`, or where it was loaded from; None where none is there. Raises
    InvalidInput where `source` is given and means none."""
    if source is not None:
        found = known_folder(source)
        if found is None:
            raise InvalidInput(f"source is {os.fspath(source)!r}; expected a folder, or owner/name of a model in the Hub's cache.")
        return found
    name, commit = getattr(model, "name_or_path", None), getattr(getattr(model, "config", None), "_commit_hash", None)
    return (known_folder(f"{name}@{commit}") if name and commit else None) or known_folder(name)


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies from `source` what `folder` lacks; returns their names."""
    copied = []
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            name = path.relative_to(source)
            target = folder / name
            if path.is_file() and not target.exists():
                with whole_file(target) as draft:
                    shutil.copyfile(path, draft)
                copied.append(str(name))
    return copied


def refuse_companion(companion: Any) -> None:
    """InvalidInput where what is to be saved beside a model cannot be."""
    if companion is not None and not hasattr(companion, "save_pretrained"):
        raise InvalidInput(f"tokenizer or processor is {companion!r:.80}; expected the object, which has save_pretrained.")
