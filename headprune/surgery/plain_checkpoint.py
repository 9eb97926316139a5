"""Pruned modules that are not of transformers: the weights, and the head maps that turn the unpruned module into theirs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from headprune.errors import CorruptCheckpoint, InvalidInput, InvalidPlan
from headprune.files import read_json
from headprune.models import attention_sites
from headprune.nn.given import refuse_wrapped
from headprune.nn.replace import own_attention, replace_multihead_attention
from headprune.surgery.cut import cut, without_memory
from headprune.surgery.manifest import FILE, KIND, check_manifest, write_manifest
from headprune.surgery.record import kept_heads, record_of

WEIGHTS = "model.safetensors"
GROUPS = "kv_of_query"  # the buffer by which a VariableHeadAttention is known


def save_plain(model: nn.Module, folder: Path, **options: Any) -> None:
    """Raises InvalidInput for options, which only transformers' `save_pretrained` takes."""
    if options:
        raise InvalidInput(f"{type(model).__name__} is not of transformers, so save takes no {', '.join(sorted(options))}.")
    save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    write_manifest(folder, class_name=type(model).__name__, record=dict(record_of(model)))


def take_layers(weights: Path, model: nn.Module) -> None:
    """Swaps torch's attentions of `model` where the file holds such a VariableHeadAttention, which takes its shape from there: one
    that was swapped, pruned or loaded by hand is in no record."""
    try:
        with safe_open(weights, "pt") as file:
            names = {name.removesuffix(f".{GROUPS}") for name in file.keys() if name.endswith(f".{GROUPS}")}  # noqa: SIM118
    except (SafetensorError, OSError):
        return  # what is wrong with it is said when it is loaded
    if any(isinstance(module, nn.MultiheadAttention) for name, module in model.named_modules() if name in names):
        replace_multihead_attention(model)


def load_plain(folder: Path, model: nn.Module, *, verify: bool = True) -> nn.Module:
    """`model`, unpruned, with its heads cut as in `folder` and the weights from there, in place and in eval mode; where heads were
    cut each torch.nn.MultiheadAttention of it becomes a VariableHeadAttention.

    Raises InvalidInput where the folder is none of `save`'s, InvalidPlan where `model` is not what was pruned,
    CorruptCheckpoint where files are off; the model is untouched by the first two, and where a tensor has another shape.
    """
    if not (folder / FILE).is_file():
        raise InvalidInput(f"{folder} holds no module that headprune saved: it has no {FILE}.")
    document = check_manifest(folder) if verify else read_json(folder / FILE, KIND)
    record = document.get("record")
    if record is None:
        raise InvalidInput(f"{folder} holds a transformers model; call load(folder) without model=.")
    refuse_wrapped(model)
    kept = kept_heads(record)
    with own_attention(model):
        head_maps = {site.name: site.head_map.to_json() for site in attention_sites(model)} if kept else {}
    for name, entry in record.get("sites", {}).items():
        if head_maps.get(name) != entry["original"]:
            raise InvalidPlan(
                f"{folder} was cut from another model: at {name} it had {entry['original']}, the given one has "
                f"{head_maps.get(name, 'no such attention')}. Give the unpruned {document.get('class_name')}."
            )
    weights, outline = folder / WEIGHTS, without_weights(model)
    take_form(outline, kept, weights)
    try:
        outline.load_state_dict(load_file(weights), strict=False, assign=True)  # torch names what has another shape
        take_form(model, kept, weights)
        load_model(model, str(weights), device="cpu")
    except (RuntimeError, SafetensorError, OSError, InvalidInput) as error:
        raise CorruptCheckpoint(f"{weights} does not fit the given {type(model).__name__}: {error}") from error
    return model.eval()


def without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device, on which a load can be tried."""
    own = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return copy.deepcopy(model, {id(found): without_memory(found) for found in (*model.parameters(), *model.buffers(), *own)})


def take_form(model: nn.Module, kept: Mapping[str, tuple[int, ...]], weights: Path) -> None:
    if kept:
        cut(model, kept, proven=True)
    take_layers(weights, model)
