"""Rewinding: the pruned model gets the weights of an earlier checkpoint, sliced alike; or only that time's learning rates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.arguments import check_arguments
from headprune.errors import HeadpruneError, InvalidInput
from headprune.hub import local_folder
from headprune.models.adapters import attention_sites
from headprune.nn.replace import replace_multihead_attention
from headprune.surgery import cut, load
from headprune.surgery.config_file import load_config
from headprune.surgery.modeling_headprune import whole
from headprune.surgery.record import SECTION, kept_heads, record_of

Source = nn.Module | str | Path | Mapping[str, Tensor]


@dataclass(frozen=True)
class RateRewind:
    """Learning rate rewinding (Renda et al. 2020): the weights stay, training is repeated with the rates of its last part.

    rate: step of the original training -> learning rate. first: the step to go back to; last: where it ended.
    """

    rate: Callable[[int], float]
    first: int
    last: int

    def __post_init__(self) -> None:
        check_arguments(RateRewind, vars(self))
        if not 0 <= self.first < self.last:
            raise InvalidInput(f"first={self.first}, last={self.last}: expected 0 <= first < last.")

    @property
    def steps(self) -> int:
        return self.last - self.first

    def __call__(self, step: int) -> float:
        """The rate of recovery's step number `step`; behind the end the last one."""
        return self.rate(min(self.first + step, self.last - 1))


def rewind_weights(model: nn.Module, source: Source) -> None:
    """Every parameter and buffer of `model` becomes that of `source`, sliced to the heads that `model` still has, in place.

    source: the unpruned model in its earlier state (any module), a folder or a state_dict of it; or of a model that was cut in
    just the same way. A state_dict of an unpruned model needs a transformers model, or give the module itself.

    Raises InvalidInput where it does not fit; the model is untouched then.
    """
    check_arguments(rewind_weights, locals())
    put_back(model, rewound_state(model, source))


@torch.no_grad()
def put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


@torch.no_grad()
def rewound_state(model: nn.Module, source: Source) -> dict[str, Tensor]:
    """What `rewind_weights` gives `model`, in the order and dtypes of its own state; InvalidInput where it does not fit."""
    state, own = sliced_state(model, source), model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        named = f"it lacks {missing[0]}" if missing else f"it has {extra[0]}, the model has not"
        raise InvalidInput(f"the rewind checkpoint does not fit {type(model).__name__}: {named}.")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise InvalidInput(
                f"the rewind checkpoint does not fit {type(model).__name__}: {name} is {list(state[name].shape)} there once it is "
                f"sliced, {list(tensor.shape)} here. Give an earlier state of the model that was pruned."
            )
    return {name: state[name].to(tensor.dtype) for name, tensor in own.items()}


def sliced_state(model: nn.Module, source: Source) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return cut_like(copy.deepcopy(source), model).state_dict()
    if isinstance(source, Mapping):
        return state_of(model, source)
    path = local_folder(source)
    if path.is_dir() and (path / "config.json").is_file():
        return cut_like(earlier_model(model, path), model).state_dict()
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise InvalidInput(f"the rewind checkpoint {path} does not exist; give a model folder or a .safetensors or .pt file.")
    try:
        state = (
            load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True, map_location="cpu")
        )
    except Exception as error:  # safetensors and pickle each have their own
        raise InvalidInput(f"the rewind checkpoint {weights} cannot be read: {error}") from None
    return state_of(model, state)


def state_of(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` as it is where its shapes are the model's, else sliced through a whole model that holds it."""
    own = model.state_dict()
    if own.keys() == state.keys() and all(state[name].shape == tensor.shape for name, tensor in own.items()):
        return state
    if not isinstance(model, PreTrainedModel):
        raise InvalidInput(
            f"the rewind state does not have the shapes of {type(model).__name__}, and an unpruned one cannot be built to slice "
            "it: give rewind=the unpruned module with that state loaded."
        )
    dense = whole_model(model)
    try:
        found = dense.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise InvalidInput(f"the rewind checkpoint does not fit {type(model).__name__}: {first_problem(error)}") from None
    tied = {name for name in found.missing_keys if name in getattr(dense, "all_tied_weights_keys", {})}
    wrong = [*sorted(set(found.missing_keys) - tied), *found.unexpected_keys]
    if wrong:
        raise InvalidInput(f"the rewind checkpoint does not fit {type(model).__name__}: {wrong[0]} is in one of them only.")
    dense.tie_weights()
    return cut_like(dense, model).state_dict()


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """An unpruned model of the same class and config, without weights (on the meta device)."""
    config = copy.deepcopy(model.config)
    if getattr(config, SECTION, None) is not None:
        delattr(config, SECTION)
    with whole(config), torch.device("meta"):
        return transformers_class(model)(config)


def transformers_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """What transformers calls it: a model that `load` built is of a subclass."""
    for kind in type(model).__mro__:
        if getattr(transformers, kind.__name__, None) is kind:
            stock: type[PreTrainedModel] = kind
            return stock
    return type(model)


def earlier_model(model: nn.Module, folder: Path) -> nn.Module:
    """The model of `folder`, whole or pruned, of the class of `model`."""
    try:
        if not isinstance(model, PreTrainedModel) or getattr(load_config(folder), SECTION, None):
            return load(folder)
        built: Any = transformers_class(model)  # what from_pretrained returns depends on output_loading_info
        found, report = built.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            dtype=next(model.parameters()).dtype,
        )  # fmt: skip
    except HeadpruneError as error:
        raise InvalidInput(f"the rewind checkpoint {folder} does not load: {error}") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InvalidInput(f"the rewind checkpoint {folder} does not load: {first_problem(error)}") from None
    wrong = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if wrong:
        raise InvalidInput(
            f"the rewind checkpoint {folder} does not fit {type(model).__name__}: {wrong[0]} is missing or of another shape."
        )
    earlier: nn.Module = found
    return earlier


def cut_like(earlier: nn.Module, model: nn.Module) -> nn.Module:
    """`earlier`, cut to the heads that `model` still has; as it is where it was cut so already."""
    record, before = record_of(model), record_of(earlier)
    if record.get("regularised"):
        raise InvalidInput("the model was exported for another engine, so which heads it has is not known; rewind before that.")
    kept = kept_heads(record)
    if kept_heads(before):
        if kept_heads(before) != kept:
            raise InvalidInput("the rewind checkpoint was pruned to other heads than the model; give an unpruned one.")
        return earlier
    if not kept:
        return earlier
    earlier = replace_multihead_attention(earlier)
    found = {site.name: site.head_map.to_json() for site in attention_sites(earlier)}
    for name, entry in record["sites"].items():
        if found.get(name) != entry["original"]:
            raise InvalidInput(
                f"the rewind checkpoint does not fit the model: {name} has {found.get(name, 'no attention')} there, and had "
                f"{entry['original']} before pruning."
            )
    cut(earlier, kept, proven=True)
    return earlier


def first_problem(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
