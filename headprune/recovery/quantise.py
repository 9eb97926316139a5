"""Quantisation after pruning and recovery: weights in few bits, or activations too, through torchao, measured beside the models
that they come from."""

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

FORMS = {"int8": "weights in int8", "int4": "weights in int4", "w8a8": "weights and activations in int8"}
GROUP = 32  # inputs that share a scale in int4


@dataclass(frozen=True)
class Quantised:
    """What `quantise` did: the layers whose weights it rounded, and those that it left, each with the reason."""

    form: str
    layers: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        why = "".join(f"; {name} stays: {reason}" for name, reason in self.left.items())
        return f"{FORMS[self.form]} in {len(self.layers)} linear layers{why}"


def quantise(model: nn.Module, form: str = "int8", *, group: int = GROUP) -> Quantised:
    """Rounds the weights of `model`'s linear layers to `form`, in place. The output head and tied weights stay as they are.

    "int8": one scale a row; "int4": one scale for each `group` inputs of a row; activations stay floating point. "w8a8": weights
    as in "int8", and each token's inputs are rounded so when they come (dynamic quantisation), so that products are of integers:
    faster where the processor has them (VNNI, tensor cores), for many tokens at a time.

    Quantise last: a quantised model can neither be pruned, trained nor saved. The rounding needs no data, so saving the pruned
    model and calling this after `load` gives the same again. int4 is held in int8 where torchao has no packed kernel for the
    device (its CPU build), which shows the quality, not the size.

    Raises InvalidInput for an unknown form, and where torchao is missing.
    """
    check_arguments(quantise, locals())
    chosen, left = rounded_layers(model, form, group)
    from torchao.quantization import quantize_

    modules = set(chosen.values())
    quantize_(model, settings_of(form, group, model), filter_fn=lambda module, name: module in modules)
    return Quantised(form, tuple(chosen), left)


def settings_of(form: str, group: int, model: nn.Module) -> Any:
    """torchao's configuration."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if form == "int4":
        types: Any = torch  # whose own types leave int4 out
        return IntxWeightOnlyConfig(types.int4, PerGroup(group))
    if form == "w8a8":
        return Int8DynamicActivationInt8WeightConfig(reduce_range=in_seven_bits(model))
    return Int8WeightOnlyConfig()


def in_seven_bits(model: nn.Module) -> bool:
    """Whether products of integers would overflow on the model's device with all 8 bits: on a CPU without VNNI."""
    from torchao.utils import should_reduce_range

    return bool(should_reduce_range(next(model.parameters()).device))


def refuse_unknown_form(form: str) -> None:
    if form not in FORMS:
        raise unknown_name("form of weights", form, FORMS)


def rounded_layers(model: nn.Module, form: str, group: int) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """(the linear layers whose weights are rounded, by name; those that stay, with the reason). Raises as `quantise`."""
    whole_number("group", group)
    refuse_unknown_form(form)
    try:
        import torchao.quantization  # noqa: F401
        from torchao.utils import should_reduce_range  # noqa: F401 (what older releases lack)
    except ImportError:
        raise InvalidInput('weights in few bits need torchao, 0.18 or later: pip install "headprune[quantise]".') from None
    chosen, left = {}, {}
    for name in linear_layers(model):
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            left[name] = f"it is a {type(module).__name__}"
        elif form == "int4" and module.in_features % group:
            left[name] = f"its {module.in_features} inputs are no multiple of {group}"
        else:
            chosen[name] = module
    return chosen, left


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
