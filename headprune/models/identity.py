"""What tells a model from another one whose attentions have the same shapes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from headprune.errors import InvalidPlan
from headprune.models.adapters import attention_sites
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention

log = logging.getLogger("headprune")
SIZES = (  # no vocabulary: tokens may be added between scoring and pruning
    "model_type", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_experts",
    "num_local_experts", "n_routed_experts", "image_size", "patch_size", "num_mel_bins",
)  # fmt: skip
SITES, ENTRIES = 16, 4  # of so many attentions so many rows' entries are looked at
OTHER_WEIGHTS = 0.25  # relative difference; fine-tuning and rounding stay below, other weights are near 1.4


@dataclass(frozen=True)
class ModelIdentity:
    """architecture: kind and sizes from the config, of its parts as well; empty where there is none. weights: a few entries of
    output projections; None where they are on no device or quantised."""

    architecture: dict[str, int | str]
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> ModelIdentity:
        model = plain_module(model)
        return cls(architecture_of(getattr(model, "config", None)), weights_of(model))

    def check(self, model: nn.Module) -> None:
        """InvalidPlan where `model` has another architecture; a line in the log where it has other weights, which the same
        architecture may have had before or after training."""
        found = ModelIdentity.of(model)
        for name, size in self.architecture.items():
            there = found.architecture.get(name, size)  # a release may have another set of names
            if there != size:
                raise InvalidPlan(
                    f"the plan is for another model: its {name} is {size}, the given model's is {there}. Score and plan the model "
                    "that is to be pruned."
                )
        if self.weights is None or found.weights is None or len(self.weights) != len(found.weights):
            return
        off = math.dist(self.weights, found.weights) / (math.hypot(*self.weights) or 1.0)
        if off > OTHER_WEIGHTS:
            log.warning(
                "the plan was made for other weights of this architecture: sampled entries are %.0f %% off. It goes on; score and "
                "plan this model if it is not the same one trained further.", 100 * off,
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> ModelIdentity | None:
        """None where a file of an earlier version says nothing. Raises KeyError, TypeError or ValueError where it is incomplete."""
        if content is None:
            return None
        weights = content["weights"]
        return cls(dict(content["architecture"]), None if weights is None else tuple(map(float, weights)))


def architecture_of(config: Any) -> dict[str, int | str]:
    if not isinstance(config, PreTrainedConfig):
        return {}
    parts = [("", config), *((f"{name}.", getattr(config, name, None)) for name in type(config).sub_configs)]
    found = {f"{path}{name}": value_of(part, name) for path, part in parts if part is not None for name in SIZES}
    return {name: value for name, value in found.items() if isinstance(value, int | str) and value != ""}


def value_of(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # it differs from layer to layer
        return None


@torch.no_grad()
def weights_of(model: nn.Module) -> tuple[float, ...] | None:
    """Entries [up to SITES * ENTRIES] of output projections in all parts of the model."""
    with own_attention(model):
        sites = attention_sites(model, quantised=True)
    outputs: list[Tensor] = [site.output.module.weight for site in sites]
    outputs = [weight for weight in outputs if weight.numel()]
    if not all(type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.is_meta for weight in outputs):
        return None
    found: list[float] = []
    for number in range(0, len(outputs), -(-len(outputs) // SITES) or 1):
        weight = outputs[number]
        places = [torch.arange(ENTRIES, device=weight.device) * size // ENTRIES for size in weight.shape]
        found += weight[tuple(places)].tolist()
    return tuple(float(f"{entry:.5g}") for entry in found)
