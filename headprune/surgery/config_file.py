"""A model folder's config.json: read by transformers, its values checked as far as all families share them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headprune.drafts import set_aside
from headprune.errors import CorruptCheckpoint, HeadpruneError, InvalidInput, UnsupportedModel
from headprune.files import read_json
from headprune.surgery.load_options import check_dtype
from headprune.surgery.manifest import FILE, KIND
from headprune.surgery.per_layer_config import validated_quietly
from headprune.surgery.record import SECTION, kept_heads

NAME, ADAPTERS = "config.json", "adapter_config.json"
MERGE = "Attach them with peft (PeftModel.from_pretrained(model, folder)) and save what merge_and_unload() gives."
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def load_config(folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """Raises InvalidInput where `folder` is no model folder, or its config.json holds what cannot be, UnsupportedModel where it is
    of a type that comes with its own code, CorruptCheckpoint where its headprune section is not what `save` writes."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise not_a_model(Path(folder))
    try:
        check_values(path)
        with validated_quietly():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        kept_heads(getattr(config, SECTION, None))
    except HeadpruneError as error:
        raise type(error)(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{folder} is no model folder that transformers knows: {first_line(error)}") from error
    except Exception as error:  # whatever a class of configs raises on values that are not of the kind it expects
        raise InvalidInput(f"{path} holds a value that transformers does not take: {first_line(error)}") from error
    return config


def not_a_model(folder: Path) -> InvalidInput:
    """The error for a folder without a config.json."""
    if (folder / FILE).is_file():
        document = read_json(folder / FILE, KIND)
        if "exported" in document:
            return InvalidInput(f"{folder} is for {document['exported']}, which load does not read; give the model it is of.")
        name = document.get("class_name", "module")
        return InvalidInput(f"{folder} holds a {name}, which is not of transformers: hp.load(folder, model=an unpruned {name}).")
    if (folder / ADAPTERS).is_file():
        return InvalidInput(f"{folder} holds adapters without their model. {MERGE}")
    # Where runs and schedules keep theirs, and what a killed process was about to replace.
    inside = (path for path in (folder / "model", *set_aside(folder)) if (path / NAME).is_file())
    way_out = next(inside, "a folder that save_pretrained wrote, or a name on the Hub")
    reason = f"it has no {NAME}" if folder.is_dir() else "it is a file" if folder.exists() else "it does not exist"
    return InvalidInput(f"{folder} is no model folder: {reason}. Give {way_out}.")


def refuse_adapters(folder: str | os.PathLike[str]) -> None:
    """UnsupportedModel where adapters lie beside the weights, which change what the model gives."""
    if (Path(folder) / ADAPTERS).is_file():
        raise UnsupportedModel(
            f"{folder} holds adapters beside the model ({ADAPTERS}), which are not read from its files. Move them into a folder of "
            f"their own, if they are to go, or: {MERGE}"
        )


def check_values(path: Path) -> None:
    """InvalidInput where the file holds something else than a model's config, as far as transformers would not say so."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # which transformers says
    if not isinstance(document, dict):
        raise InvalidInput(f"it holds {json.dumps(document):.80}; expected a JSON object.")
    kind, code = document.get("model_type"), document.get("auto_map")
    if isinstance(code, dict) and "AutoConfig" in code and kind not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"model_type {kind!r:.80} comes with its own code, which load does not run. Load the model with transformers "
            "(AutoModel.from_pretrained(folder, trust_remote_code=True)), and give that to hp.score and hp.prune."
        )
    check_sizes(document)
    for name in ("dtype", "torch_dtype"):
        check_dtype(name, document.get(name))
    classes = document.get("architectures") or []
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InvalidInput(f'architectures is {classes!r:.80}; expected a list of names of classes (["BertModel"]).')


def check_sizes(config: Mapping[str, Any], inside: str = "") -> None:
    """InvalidInput where there is less than one of something, in the config or (inside it) in those of its parts."""
    kind = config.get("model_type")
    known: Any = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else PreTrainedConfig
    for name in SIZES:
        key = known.attribute_map.get(name, name)
        value = config.get(key)
        # A decoder that was saved alone may count no encoder_layers.
        if isinstance(value, int) and value < 1 and key != "encoder_layers":
            raise InvalidInput(f"{inside}{key} is {value}; expected a whole number, 1 or more.")
    for name in known.sub_configs:
        if isinstance(config.get(name), dict):
            check_sizes(config[name], f"{inside}{name}.")


@contextmanager
def built_as(model_class: type, folder: str | os.PathLike[str], options: Sequence[str] = ()) -> Iterator[None]:
    """CorruptCheckpoint in place of whatever `model_class` raises in the block while it is made from the config and weights of
    `folder`: a value of the config that is wrong beside another is met in any line of it. InvalidInput where it is made with
    `options`, one of which may be what is wrong; HeadpruneError where the memory is too small."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{folder}: {error}") from None
    except HeadpruneError:
        raise
    except ImportError as error:
        raise InvalidInput(f"{folder} does not load without another package: {first_line(error)}") from error
    except Exception as error:
        name = model_class.__name__
        if is_out_of_memory(error):
            raise HeadpruneError(
                f"{folder} does not fit into memory as {name}; give a smaller dtype, or another device_map. {first_line(error)}"
            ) from error
        if options:
            raise InvalidInput(f"{folder} does not load as {name} with {', '.join(options)}: {first_line(error)}") from error
        raise CorruptCheckpoint(f"{folder} does not load as {name}: {first_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Of the CPU torch says so in a RuntimeError alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def first_line(error: Exception) -> str:
    """What it says, in one line; where that alone says little, with its kind."""
    told = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    kind = f"{type(told).__name__}: " if isinstance(told, (LookupError, ArithmeticError, AssertionError)) else ""
    return kind + str(told).strip().split("\n")[0][:300]
