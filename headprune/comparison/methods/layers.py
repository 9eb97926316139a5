"""A student with fewer of the dense model's layers, trained as every other row or distilled (Sanh et al. 2019)."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch import nn

from headprune.comparison.method import Compressed, Refused, Subject, comparison_method
from headprune.errors import UnsupportedModel
from headprune.models.site import Foreign
from headprune.models.trunk import trunk_of
from headprune.recovery import Distillation
from headprune.recovery.objective import default_distillation


@comparison_method("layers", label="layers", kind="structured pruning", granularity="layers", library="headprune")
def layers(subject: Subject) -> Compressed:
    """The dense model with evenly spaced layers left out, as many as come nearest to what head pruning removes."""
    return shallower(subject)


@comparison_method("distilled", label="distilled student", kind="distillation", granularity="layers", library="headprune")
def distilled(subject: Subject) -> Compressed:
    """The same student, which then learns from the dense model's outputs instead of the task's loss."""
    found = shallower(subject)
    terms = default_distillation(found.model, subject.calibration[0], subject.task.loss)
    teaches = Distillation(embedding=1.0) if terms.embedding else terms  # states of layers that are gone have no counterpart
    return replace(found, teaches=teaches, note=f"{found.note}; learns the dense model's {', '.join(teaches.weights)}")


def shallower(subject: Subject) -> Compressed:
    model = subject.copy()
    try:
        trunk = trunk_of(model)
    except UnsupportedModel:
        raise Refused("its attentions do not lie in one stack of layers") from None
    if not all(site.own_keys for inside in trunk.sites for site in inside):
        raise Refused("its last layers read keys and values of earlier ones")
    size = statistics.fmean(sum(parameter.numel() for parameter in layer.parameters()) for layer in trunk.layers)
    count = len(trunk.layers)
    gone = round(subject.removed / size)
    if not 0 < gone < count:
        raise Refused(f"{subject.removed:,} parameters are to go, {subject.removed / size:.2f} of its {count} layers")
    kept = torch.linspace(0, count - 1, count - gone).round().int().tolist()
    keep_layers(model, trunk.name, kept)
    note = f"layers {', '.join(map(str, kept))} of {count} stay"
    return Compressed(model, f"{note}; {gone * size:,.0f} parameters where {subject.removed:,} were asked for")


def keep_layers(model: nn.Module, name: str, kept: list[int]) -> None:
    """Drops the other layers of the stack `name`, in place; layer numbers and the config follow."""
    stack: Foreign = model.get_submodule(name)
    left = nn.ModuleList(stack[index] for index in kept)
    model.set_submodule(name, left)
    for number, layer in enumerate(left):
        modules: list[Foreign] = list(layer.modules())
        for module in modules:
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    config = getattr(model, "config", None)
    if config is None:
        return
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list) and len(value) == len(stack):  # layer_types and the like
            setattr(config, field, [value[index] for index in kept])
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(kept)
