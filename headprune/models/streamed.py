"""A transformers model whose weights stay on disk: a layer's are read when it runs, and dropped when it is done.

The modules hold no memory (meta device) until then. What lies outside of the stack of layers (embeddings, final norm, head) is
one further part. `StreamedModel.holding(part)` keeps a part while many batches go through it.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, convert_and_load_state_dict_in_model, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.models.shards import Shards, Stored, read_stored
from headprune.models.trunk import Trunk, refuse_without_layers, trunk_of

MMAP_THRESHOLD, LARGE = -3, 1 << 20  # M_MMAP_THRESHOLD of malloc.h
# Older releases of transformers ask for the tensor-parallel plan.
NO_PLAN = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
Part = int | None  # the number of a layer, or None for all that is outside of the stack


class StreamedModel:
    """Reads the parts of `model` (on the meta device, with real buffers) from `shards`.

    device: where the layers run. Reading is one part ahead, in a thread of its own; for a GPU through pinned memory.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards, device: torch.device | str = "cpu") -> None:
        give_memory_back()
        self.model, self.shards, self.device = model, shards, torch.device(device)
        self.trunk: Trunk = trunk_of(model)
        refuse_without_layers(self.trunk)
        self._transforms: list[Any] = get_model_conversion_mapping(model)
        refuse_misfit(model, shards, memory_names(model, shards))
        self._stored = stored_by_part(model, self.trunk, shards)
        self._not_stored = set(model.state_dict()) - {name for name, _ in known_names(model, shards).values()}
        self.instead: dict[str, Stored] = {}  # name in memory -> what is read in place of the model's own
        self._held: set[Part] = set()
        self._ahead: dict[Part, Future[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="headprune-reader")
        for buffer_owner in model.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    made = torch.zeros_like(buffer, device=self.device) if buffer.is_meta else buffer.to(self.device)
                    buffer_owner._buffers[name] = made  # one made like a weight (I-BERT) is nothing but room
        for index, layer in enumerate(self.trunk.layers):
            layer.forward = self._reading(index, layer.forward)
        model.forward = self._reading(None, model.forward)

    @contextmanager
    def holding(self, part: Part, then: Part | EllipsisType = ...) -> Iterator[None]:
        """The weights of `part` are there inside the block; meanwhile those of `then` are read already."""
        mine = part not in self._held
        if mine:
            self._load(part)
            self._held.add(part)
        if then is not ...:
            self.ahead(then)
        try:
            yield
        finally:
            if mine:
                self._held.discard(part)
                self._drop(part)

    def ahead(self, part: Part) -> None:
        """Starts to read `part`, which will be asked for next."""
        if part not in self._held and part not in self._ahead and part in self._stored:
            self._ahead[part] = self._reader.submit(self._read, part)

    def _read(self, part: Part) -> dict[str, Tensor]:
        pinned = self.device.type == "cuda"
        return {name: self.shards.read(name, pinned) for name in self._stored[part]}

    def _load(self, part: Part) -> None:
        waiting = self._ahead.pop(part, None)
        state = self._read(part) if waiting is None else waiting.result()
        with quiet_loading():
            config = LoadStateDictConfig(weight_mapping=copy.deepcopy(self._transforms), device_map={"": str(self.device)})
            convert_and_load_state_dict_in_model(self.model, state, config, **NO_PLAN)
        if part is None:  # as where the whole model is loaded: what is stored twice, and differs, is not tied
            self.model.tie_weights(missing_keys=set(self._not_stored), recompute_mapping=False)
        missing = next((name for name, tensor in self._parameters(part) if tensor.is_meta), None)
        if missing is not None:
            raise CorruptCheckpoint(f"{self.shards.folder} lacks the weights of {missing}.")
        for name, parameter in self._parameters(part):
            parameter.requires_grad_(False)
            if name in self.instead:
                parameter.data = read_stored(self.instead[name]).to(parameter)

    def _drop(self, part: Part) -> None:
        for module in self._modules(part):
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        if part is None:
            self.model.tie_weights()

    def _modules(self, part: Part) -> Sequence[nn.Module]:
        if part is not None:
            return tuple(self.trunk.layers[part].modules())
        inside = {module for layer in self.trunk.layers for module in layer.modules()}
        return [module for module in self.model.modules() if module not in inside]

    def _parameters(self, part: Part) -> list[tuple[str, nn.Parameter]]:
        owners = {id(module) for module in self._modules(part)}
        return [
            (f"{path}.{name}", parameter)
            for path, module in self.model.named_modules()
            if id(module) in owners
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def _reading(self, part: Part, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.holding(part):
                return forward(*args, **kwargs)

        return run


def give_memory_back() -> None:
    """From now on this process hands large freed blocks back to the system. glibc would raise the size from which it does so with
    every block that is freed, up to 32 MiB, keep the pieces, and grow layer after layer. Other C libraries are left alone."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


def stored_by_part(model: PreTrainedModel, trunk: Trunk, shards: Shards) -> dict[Part, list[str]]:
    """Part -> the names in the files that its weights are made from. Tensors that the model does not know are left out."""
    found: dict[Part, list[str]] = {part: [] for part in (*range(len(trunk.layers)), None)}
    for stored, (name, _) in known_names(model, shards).items():
        inside = name.startswith(f"{trunk.name}.")
        found[int(name[len(trunk.name) + 1 :].partition(".")[0]) if inside else None].append(stored)
    return found


def memory_names(model: PreTrainedModel, shards: Shards) -> dict[str, str]:
    """Name in the files -> name in memory, of the tensors that are the same in both."""
    return {stored: name for stored, (name, same) in known_names(model, shards).items() if same}


def refuse_misfit(model: nn.Module, shards: Shards, names: Mapping[str, str]) -> None:
    """CorruptCheckpoint where a tensor has another shape in the files than in `model`. names: as `memory_names` gives them."""
    expected = model.state_dict()
    for stored, name in names.items():
        if shards[stored].shape != tuple(expected[name].shape):
            raise CorruptCheckpoint(
                f"{shards.folder} does not fit its config, which asks for {name} {list(expected[name].shape)}: "
                f"{shards[stored].path.name} holds {list(shards[stored].shape)}."
            )


def known_names(model: PreTrainedModel, shards: Shards) -> dict[str, tuple[str, bool]]:
    """Name in the files -> (name in memory, whether it is the same tensor there), as transformers would load it. Of a tensor that
    others are joined or split from, the first name in memory."""
    expected, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    found = {}
    for stored in shards:
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and stored in expected:
            name, converter = stored, None
        if name in expected:
            found[stored] = (name, converter is None)
    return found


def streamed_of(model: nn.Module) -> StreamedModel | None:
    """The reader of a model that `open_streamed` gave; None of any other."""
    reader: StreamedModel | None = getattr(model, "headprune_streamed", None)
    return reader


def reader_of(model: nn.Module) -> StreamedModel:
    """The reader of a model that `open_streamed` gave; InvalidInput for any other."""
    reader = streamed_of(model)
    if reader is None:
        raise InvalidInput(f"this {type(model).__name__} is in memory; give what headprune.open_streamed opens.")
    return reader


def refuse_streamed(model: nn.Module, doing: str, instead: str) -> None:
    """InvalidInput where `model` is one that `open_streamed` gave, naming what is not done with it, and what is."""
    if streamed_of(model) is not None:
        raise InvalidInput(f"the weights of this {type(model).__name__} are on disk (open_streamed), {doing}; {instead}.")


@contextmanager
def quiet_loading() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
