"""The files of a model folder that are neither weights nor config: tokenizer, processor, templates, pooling, licences."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from headprune.files import whole_file
from headprune.hub import known_folder
from headprune.model_folder import COMPANIONS


def origin_of(model: nn.Module, source: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with the files that belong to `model`: `source`, or where it was loaded from; None where none is there."""
    if source is not None:
        return known_folder(source)
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
