"""Opens a model folder without reading its weights: they are read layer by layer as the model runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from headprune.arguments import check_arguments
from headprune.hub import local_folder
from headprune.models.placement import refuse_absent
from headprune.models.quantised import refuse_stored_quantised
from headprune.models.shards import open_shards
from headprune.models.site import Foreign
from headprune.models.streamed import StreamedModel
from headprune.surgery.checkpoint import class_of, pruned_class
from headprune.surgery.config_file import built_as, load_config, refuse_adapters
from headprune.surgery.record import SECTION


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside the block every parameter of a new module is on the meta device; buffers, which are computed, are real."""
    modules: Any = nn.Module
    register = modules.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    modules.register_parameter = registered
    try:
        with EmptyOnMeta():
            yield
    finally:
        modules.register_parameter = register


class EmptyOnMeta(TorchFunctionMode):
    """Large weights take no memory from the start."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def open_streamed(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, base: bool = False
) -> PreTrainedModel:
    """The model of `folder`, in eval mode, with its weights on disk. It scores (`hp.score`) and runs like any other, and
    holds at most two layers' weights, or the embeddings and the head, at a time.

    Args:
        device: where the layers run.
        dtype: of the weights once they are read; default as the config says, or else the files.
        base: without the head of a language model, as in `hp.load`.

    Raises InvalidInput where the folder is no transformers model with safetensors weights, CorruptCheckpoint naming a weight file
    that is missing or cut short, or weights of other shapes than the config's, UnsupportedModel where the attentions do not lie in
    one stack of layers or the weights are quantised.
    """
    check_arguments(open_streamed, locals())
    refuse_absent(device)
    folder = local_folder(folder)
    config = load_config(folder)
    shards = open_shards(folder)
    refuse_stored_quantised(config, folder)
    refuse_adapters(folder)
    model_class = class_of(config, base)
    built = pruned_class(model_class, getattr(config, SECTION, None))
    with empty_weights(), built_as(model_class, folder):
        model: PreTrainedModel = built._from_config(config, dtype=dtype or config.dtype or shards.dtype)
    model.eval().requires_grad_(False)
    model.tie_weights()
    model.name_or_path = os.path.abspath(folder)
    if model.can_generate() and (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        with built_as(model_class, folder):
            model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
    opened: Foreign = model
    opened.headprune_streamed = StreamedModel(model, shards, device)
    return model
