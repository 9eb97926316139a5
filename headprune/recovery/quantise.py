"""Quantisation after pruning and recovery: int8 or int4 weights through torchao, measured beside the models that they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name, whole_number
from headprune.evaluation.cost import weight_bytes
from headprune.evaluation.latency import measure_latency
from headprune.evaluation.tasks import Task
from headprune.recovery.methods import linear_layers
from headprune.scoring.passes import in_eval_mode

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantised:
    """What `quantise` did: the layers whose weights it rounded, and those that it left, each with the reason."""

    form: str
    layers: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        why = "".join(f"; {name} stays: {reason}" for name, reason in self.left.items())
        return f"{self.form} weights in {len(self.layers)} linear layers{why}"


def quantise(model: nn.Module, form: str = "int8", *, group: int = 32) -> Quantised:
    """Rounds the weights of `model`'s linear layers to `form` ("int8": one scale a row; "int4": one scale for each `group`
    inputs of a row), in place; activations stay floating point. The output head and tied weights stay as they are.

    Quantise last: a quantised model can neither be pruned, trained nor saved. The rounding needs no data, so saving the pruned
    model and calling this after `load` gives the same again. int4 is held in int8 where torchao has no packed kernel for the
    device (its CPU build), which shows the quality, not the size.

    Raises InvalidInput for an unknown form, and where torchao is missing.
    """
    check_arguments(quantise, locals())
    whole_number("group", group)
    if form not in BITS:
        raise unknown_name("form of weights", form, BITS)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError:
        raise InvalidInput('quantise needs torchao: pip install "headprune[quantise]".') from None
    names = linear_layers(model)
    modules = {name: model.get_submodule(name) for name in names}
    left = {name: f"it is a {type(module).__name__}" for name, module in modules.items() if not isinstance(module, nn.Linear)}
    settings: Any = Int8WeightOnlyConfig()
    if form == "int4":
        types: Any = torch  # whose own types leave int4 out
        settings = IntxWeightOnlyConfig(weight_dtype=types.int4, granularity=PerGroup(group))
        left |= {
            name: f"its {module.in_features} inputs are no multiple of {group}"
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and module.in_features % group
        }
    chosen = {module for name, module in modules.items() if name not in left}
    quantize_(model, settings, filter_fn=lambda module, name: module in chosen)
    return Quantised(form, tuple(name for name in names if name not in left), left)


@dataclass(frozen=True)
class QuantisedQuality:
    """One model in one form. bytes: of its parameters and buffers, as stored in memory."""

    model: str
    form: str
    quality: dict[str, float]
    bytes: int
    latency_p50_ms: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_quantised(
    models: Mapping[str, nn.Module],
    task: Task,
    forms: Sequence[str] = ("int8", "int4"),
    *,
    repeats: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> list[QuantisedQuality]:
    """Each of `models` (say dense, pruned, recovered) as it is and in every form, on one task: what pruning and quantisation give
    together. The models stay as they are; latencies are measured in turn."""
    check_arguments(compare_quantised, locals())
    whole_number("repeats", repeats)
    made: dict[tuple[str, str], nn.Module] = {}
    found = []
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(in_eval_mode(model))
            made[name, "as it is"] = model
            for form in forms:
                made[name, form] = copy.deepcopy(model)
                quantise(made[name, form], form)
        latency = measure_latency({f"{name} {form}": model for (name, form), model in made.items()}, task.latency_inputs(), repeats)
        for (name, form), model in made.items():
            quality, p50 = task.evaluate(model), latency[f"{name} {form}"].p50_ms
            found.append(QuantisedQuality(name, form, quality, weight_bytes(model), p50))
            if progress:
                progress(len(found), len(made))
    return found
