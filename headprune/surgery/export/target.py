"""Where a pruned model can go: one registered function per target, each in a file of its own."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, UnsupportedModel, unknown_name
from headprune.files import refuse_unwritable, whole_file
from headprune.model_folder import refuse_replacing, whole_model
from headprune.models.quantised import refuse_quantised
from headprune.models.streamed import refuse_streamed
from headprune.nn.given import plain_module, refuse_sharded
from headprune.surgery.checkpoint import refuse_adapters
from headprune.surgery.companions import copy_companions, origin_of, refuse_companion
from headprune.surgery.manifest import mark_exported

# Writes the model, which it may change, to a folder (or a file) and says what it did, a line each.
Writer = Callable[[PreTrainedModel, Path, dict[str, Any]], list[str]]


@dataclass(frozen=True)
class Target:
    """summary: what reads it. packages: what must be installed. suffix: names a single file in place of a folder."""

    name: str
    summary: str
    write: Writer
    packages: tuple[str, ...] = ()
    suffix: str | None = None


_targets: dict[str, Target] = {}


def target(name: str, summary: str, *, packages: tuple[str, ...] = (), suffix: str | None = None) -> Callable[[Writer], Writer]:
    """Registers a writer under `name`."""

    def register(write: Writer) -> Writer:
        _targets[name] = Target(name, summary, write, packages, suffix)
        return write

    return register


def targets() -> dict[str, Target]:
    return dict(_targets)


@dataclass(frozen=True)
class Exported:
    """What came of an export: where it is, and what was done to the model on the way."""

    target: str
    path: Path
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.target}: {self.path}", *(f"  {note}" for note in self.notes)])


def export(
    model: PreTrainedModel,
    to: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    keep_model: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Writes `model`, pruned or not, for another engine; its outputs stay the same, which is checked where it can be.

    Args:
        to: see `targets()`.
        output: a folder, or for targets of one file also its name ("model.gguf"). All of it is written or nothing.
        tokenizer: saved beside it; default the files of `source`, by default the folder that the model came from.
        keep_model: work on a copy; False saves the memory of one and leaves `model` unusable.
        overwrite: as in `hp.save`; a file that is there is replaced with it alone.
        options: of the target.

    Raises UnsupportedModel where the target cannot hold the model, InvalidInput for an unknown target or option and where a
    package is missing, HeadpruneError where the disk refuses.
    """
    if isinstance(model, nn.Module):
        model = plain_module(model)  # type: ignore[assignment]  # another class is refused below
        refuse_sharded(model)
    check_arguments(export, {"to": to, "output": output, "source": source})
    found = get_target(to)
    missing = [package for package in found.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InvalidInput(f"export to {to} needs {' and '.join(missing)}: pip install 'headprune[export]'.")
    if not isinstance(model, PreTrainedModel):
        refuse_adapters(model, "export")
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model; only those can be exported. "
            "torch.onnx.export(model, inputs, dynamo=True) and torch.export.export take a pruned plain module."
        )
    refuse_companion(tokenizer)
    refuse_streamed(model, "which an export needs whole", "export what hp.load gives")
    output = Path(output)
    refuse_output(to, output, overwrite)
    origin = origin_of(model, source)
    working = copy.deepcopy(model) if keep_model else model
    options = {**options, "tokenizer": tokenizer, "source": origin}
    if writes_file(found, output):
        with whole_file(output) as draft:
            notes = found.write(working, draft, options)
    else:
        with whole_model(output) as draft:
            notes = found.write(working, draft if found.suffix is None else draft / f"model{found.suffix}", options)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            if origin is not None:
                copy_companions(origin, draft)
            mark_exported(draft, to)
    return Exported(to, output, tuple(notes))


def get_target(name: str) -> Target:
    if name not in _targets:
        raise unknown_name("export target", name, _targets)
    return _targets[name]


def writes_file(target: Target, output: Path) -> bool:
    return target.suffix is not None and output.suffix.lower() == target.suffix


def refuse_output(to: str, output: Path, overwrite: bool) -> None:
    """InvalidInput where an export to the target `to` may not be written as `output`, or that is called like another one's file."""
    found = get_target(to)
    if not writes_file(found, output) and any(writes_file(other, output) for other in _targets.values()):
        own = "a folder" if found.suffix is None else f"a name that ends in {found.suffix}, or a folder"
        raise InvalidInput(f"{output} ends in {output.suffix}, and an export to {to} writes no such file; give {own}.")
    if writes_file(found, output):
        refuse_unwritable(output, file=True)
        if output.exists() and not overwrite:
            raise InvalidInput(f"{output} is there already; give another name, or --overwrite (overwrite=True) where it may go.")
    else:
        refuse_replacing(output, overwrite)


def refuse_other_weights(model: PreTrainedModel) -> None:
    """UnsupportedModel where adapters or rounded numbers stand in for the weights, which the target writes as they are."""
    refuse_adapters(model, "export")
    refuse_quantised(
        model,
        "this export does not write; export the model before quantising it: engines round weights themselves (dtype=q8_0 for gguf)",
    )


def refuse_unknown(options: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """InvalidInput for an option that the target does not know."""
    for name in sorted(set(options) - {"tokenizer", "source", *known}):
        raise unknown_name("export option", name, [*known, "tokenizer", "source"])
