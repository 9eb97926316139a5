"""What recovery trains: all weights, the attention projections alone, or low-rank adapters that are merged at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name, whole_number
from headprune.models.adapters import attention_sites
from headprune.models.site import PLAIN_LINEAR, is_conv1d
from headprune.nn.replace import through_modules


@dataclass(frozen=True)
class Method:
    """A registered way. prepare: a context in which the right parameters of `model` ask for gradients; what it added is trained in
    training mode, and merged into the model's own weights when the block ends. lr: the default peak learning rate."""

    name: str
    lr: float
    prepare: Callable[..., AbstractContextManager[None]]

    def refuse_unknown(self, options: Iterable[str]) -> None:
        """InvalidInput for an option that it does not have."""
        known = [name for name in signature(self.prepare).parameters if name != "model"]
        for name in options:
            if name not in known:
                raise unknown_name(f"option of method={self.name}", name, known)


_methods: dict[str, Method] = {}


def recovery_method(name: str, lr: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated generator `prepare(model, **options)` as recover(method=name)."""

    def register(prepare: Callable[..., Any]) -> Callable[..., Any]:
        _methods[name] = Method(name, lr, contextmanager(prepare))
        return prepare

    return register


def recovery_methods() -> dict[str, Method]:
    """Every method by name."""
    return dict(_methods)


def get_method(name: str) -> Method:
    if name not in _methods:
        raise unknown_name("recovery method", name, _methods)
    return _methods[name]


@recovery_method("full", lr=3e-5)
def full(model: nn.Module) -> Iterator[None]:
    """Every parameter that asks for gradients."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidInput(f"no parameter of {type(model).__name__} asks for gradients; call requires_grad_() on what may change.")
    yield


@recovery_method("projections", lr=1e-4)
def projections(model: nn.Module) -> Iterator[None]:
    """The query, key, value and output projections of every attention, with their biases."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    sites = attention_sites(model)
    if not sites:
        raise InvalidInput(f"{type(model).__name__} has no attention whose projections could be trained.")
    modules = set(model.modules())
    for site in sites:
        if any(part.module not in modules for part in site.projections):
            raise InvalidInput(
                f"{site.name} ({type(site.module).__name__}) holds its projections as parameters of its own, not as layers that "
                "could be trained alone; give method='full'."
            )
    model.requires_grad_(False)
    for site in sites:
        for part in site.projections:
            part.module.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, was in before.items():
            parameter.requires_grad_(was)


@recovery_method("lora", lr=5e-4)
def lora(
    model: nn.Module, *, rank: int = 16, alpha: float | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> Iterator[None]:
    """Low-rank adapters (Hu et al. 2022) through peft, merged into the weights at the end.

    rank, alpha (default 2 rank), dropout: as in peft.LoraConfig. targets: whole names of linear layers; default all but the output
    head. Raises InvalidInput where peft is missing, there is nothing to adapt, or an option is none that it can be done with.
    """
    check_arguments(lora, locals())
    whole_number("rank", rank)
    if not 0 <= dropout < 1:
        raise InvalidInput(f"dropout is {dropout}; expected the share to drop, at least 0 and below 1.")
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise InvalidInput('method="lora" needs peft: pip install "headprune[recovery]".') from None
    names = linear_layers(model) if targets is None else list(targets)
    if not names:
        raise InvalidInput(f"{type(model).__name__} has no linear layer to adapt.")
    refuse_unadaptable(model, names)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # a fraction works too
        lora_dropout=dropout, target_modules="|".join(map(re.escape, names)),  # of a list peft takes every name that ends so
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in names),
    )  # fmt: skip
    tuner = LoraModel(model, settings, "recovery")
    try:
        with through_modules():
            yield
        tuner.merge_and_unload(progressbar=False)
    except BaseException:
        tuner.unload()
        raise
    finally:
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, was in before.items():
            parameter.requires_grad_(was)


def refuse_unadaptable(model: nn.Module, names: Sequence[str]) -> None:
    """InvalidInput where peft would stop halfway, and leave the adapters that it has put in already."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise unknown_name("linear layer in targets", name, linear_layers(model))
        if not (isinstance(modules[name], (nn.Linear, nn.Embedding)) or is_conv1d(modules[name])):
            raise InvalidInput(f"targets has {name}, a {type(modules[name]).__name__}; expected linear layers.")


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that hold weights, but for the output head and layers that share a weight."""
    head_of = getattr(model, "get_output_embeddings", None)
    head = None if head_of is None else head_of()
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ in PLAIN_LINEAR)
        and module is not head and module.weight.numel() and users[id(module.weight)] == 1
    ]  # fmt: skip
