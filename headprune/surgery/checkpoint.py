"""Pruned models on disk: ordinary transformers folders whose config says which heads are left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from headprune.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from headprune.files import whole_folder
from headprune.models.attention_interface import NAME
from headprune.surgery.cut import cut
from headprune.surgery.record import SECTION, head_map_after, kept_heads


def save(model: PreTrainedModel, folder: str | os.PathLike, *, tokenizer: Any = None, **options: Any) -> Path:
    """Writes `model` (and `tokenizer`) to `folder`: all of it or nothing; what stood there is replaced at the end.

    options: as for `save_pretrained` (max_shard_size, ...). Raises UnsupportedModel for a model that is not of
    transformers, HeadpruneError where the disk refuses.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"{type(model).__name__} is not a transformers model; save its state_dict and the plan instead.")
    folder = Path(folder)
    with whole_folder(folder) as draft:
        model.save_pretrained(draft, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return folder


def load(folder: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """A model from `folder`, pruned by headprune or not, in eval mode.

    options: as for `from_pretrained` (dtype, device_map, attn_implementation, ...). Where groups are ragged the attention
    is "headprune" unless you name another.

    Raises InvalidInput where the folder is no model, CorruptCheckpoint where its weights do not fit its config.
    """
    config = load_config(folder)
    kept = kept_heads(getattr(config, SECTION, None))
    if any(not head_map_after(site["original"], site["kept"]).is_uniform for site in sites_section(config)):
        options.setdefault("attn_implementation", NAME)
    model_class = class_of(config)
    try:
        model, report = pruned_class(model_class, kept).from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CorruptCheckpoint(f"{folder} does not load as {model_class.__name__}: {first_line(error)}") from error
    # A head that a task adds later (a pooler, say) may be missing in stock folders; an attention weight may not.
    missing = sorted(key for key in report["missing_keys"] if any(key.startswith(f"{name}.") for name in kept))
    if missing:
        raise CorruptCheckpoint(f"{folder} lacks weights that its config promises: {', '.join(missing[:3])}.")
    return model


def skeleton(folder: str | os.PathLike) -> PreTrainedModel:
    """The model of `folder` without its weights (on the meta device): sites, head maps and sizes at no cost."""
    config = load_config(folder)
    with torch.device("meta"):
        return pruned_class(class_of(config), kept_heads(getattr(config, SECTION, None)))(config)


def load_config(folder: str | os.PathLike) -> transformers.PreTrainedConfig:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder} is no model folder: it has no config.json. Give a folder that save_pretrained wrote.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{folder} is no model folder that transformers knows: {first_line(error)}") from error


def class_of(config: transformers.PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the config names, else the base model of its type."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return AutoModel._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedModel(f"no transformers class is known for a {type(config).__name__}.") from None


def pruned_class(model_class: type[PreTrainedModel], kept: dict[str, tuple[int, ...]]) -> type[PreTrainedModel]:
    """`model_class` whose instances are built with only the `kept` heads, so that sliced weights load into them."""
    if not kept:
        return model_class

    def __init__(self, config, *args, **options) -> None:
        section = getattr(config, SECTION)
        model_class.__init__(self, config, *args, **options)
        delattr(config, SECTION)  # what is built so far is the whole original
        cut(self, kept, verify=False)
        setattr(config, SECTION, section)

    # The same name, so that a further save names a class that transformers has.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def sites_section(config: transformers.PreTrainedConfig) -> list[dict]:
    return list((getattr(config, SECTION, None) or {}).get("sites", {}).values())


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
