"""A model's pass taken apart at its stack of layers: what comes before the first layer, each layer by itself, and what comes
behind the last. So a layer's weights need to be there only while all batches go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from headprune.errors import UnsupportedModel
from headprune.kv_sharing import ARGUMENT, gives_keys, reads_keys
from headprune.models.adapters import attention_sites
from headprune.models.checkpointing import without_cache
from headprune.models.emptied_sharing import place_of
from headprune.models.replaced import replaced_forward
from headprune.models.site import AttentionSite

LayerCall = dict[str, Any]  # the arguments of one layer beside the states that go through all of them; tensors on the CPU
Shared = dict[Any, tuple[Tensor, Tensor]]  # keys and values that layers hand to later ones, by their place there


@dataclass(frozen=True)
class Entry:
    """What a batch is when it enters the stack: states [batch, tokens, hidden] and the call of each layer, without shared keys.

    alone: the layers return the states themselves, not a tuple with them."""

    states: Tensor
    calls: tuple[LayerCall, ...]
    alone: bool


@dataclass(frozen=True)
class KeySource:
    """The earlier layer whose keys and values a layer reads, and the place where it finds them."""

    layer: int
    place: Any


@dataclass(frozen=True)
class Trunk:
    """The layers of `model` in order, and the attention sites in each. name: the stack's path in the model."""

    model: nn.Module
    name: str
    layers: tuple[nn.Module, ...]
    sites: tuple[tuple[AttentionSite, ...], ...]

    @cached_property
    def readers(self) -> dict[int, KeySource]:
        """Layers that have no keys of their own, in order -> where they read some."""
        givers: dict[Any, KeySource] = {}
        found: dict[int, KeySource] = {}
        for index, site in ((index, site) for index, inside in enumerate(self.sites) for site in inside):
            if gives_keys(site.module):
                givers[place_of(site.module)] = KeySource(index, place_of(site.module))
            elif reads_keys(site.module):
                found[index] = givers[place_of(site.module)]
        return found

    def run(self, index: int, call: LayerCall, states: Tensor, shared: Shared) -> Tensor:
        """What layer `index` makes of `states`, on their device. shared: the keys that it reads; those that it gives are added."""
        kwargs = tree_map(lambda leaf: leaf.to(states.device) if isinstance(leaf, Tensor) else leaf, call)
        if ARGUMENT in kwargs:
            kwargs[ARGUMENT] = shared
        return states_of(self.layers[index](states, **kwargs))[0]


def trunk_of(model: nn.Module) -> Trunk:
    """Raises UnsupportedModel unless all attentions of `model` lie in the layers of one stack (a torch.nn.ModuleList)."""
    sites = attention_sites(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(site.name.startswith(f"{name}.") for site in sites):
            inside = tuple(tuple(site for site in sites if site.name.startswith(f"{name}.{i}.")) for i in range(len(module)))
            return Trunk(model, name, tuple(module), inside)
    raise UnsupportedModel(
        f"{type(model).__name__} does not have all its attentions in one stack of layers, as streaming needs; load it whole."
    )


def outermost_layers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """(layer, features of its states) in all stacks (torch.nn.ModuleList) that hold attentions; one outside them stands alone."""
    found: dict[nn.Module, int] = {}
    for site in attention_sites(model):
        inner: nn.Module = model
        for part in site.name.split("."):
            outer, inner = inner, inner.get_submodule(part)
            if isinstance(outer, nn.ModuleList):
                break
        found.setdefault(inner, site.hidden_size)
    return list(found.items())


def refuse_unknown_sharing(trunk: Trunk) -> None:
    """UnsupportedModel where a layer gets something from earlier ones that is neither states nor found in an argument."""
    reader = next((site for inside in trunk.sites for site in inside if not site.own_keys and not reads_keys(site.module)), None)
    if reader is not None:
        raise UnsupportedModel(
            f"{reader.name} reads keys and values of an earlier layer, so its layer cannot run by itself; load the model whole "
            "instead of streaming it."
        )


def refuse_without_layers(trunk: Trunk) -> None:
    """UnsupportedModel where the weights of an attention have another form in the files than heads are reached by."""
    site = next((site for inside in trunk.sites for site in inside if not site.has_layers), None)
    if site is not None:
        raise UnsupportedModel(
            f"{site.name} ({type(site.module).__name__}) holds its heads in no linear layers; load the model whole instead of "
            "streaming it."
        )


class _Entered(Exception):
    """Stops a pass behind the last layer."""


@torch.no_grad()
def enter(trunk: Trunk, run: Callable[[], Any]) -> Entry:
    """What `run`, one pass of the model, hands to the layers. Of these only the first one runs; the pass ends with the call of the
    module that comes behind the last.

    Raises UnsupportedModel where the layers are not called once each in their order, or give on more than the states and shared
    keys, or not all tokens.
    """
    refuse_unknown_sharing(trunk)
    once = f"expected each of the {len(trunk.layers)} layers of {trunk.name} once, in their order; load the model whole."
    calls: list[LayerCall] = []
    first: list[Tensor] = []
    alone: list[bool] = []
    over: list[int] = []
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def on_cpu(leaf: Any) -> Any:
        # Masks and rotary tables are the same tensors for all layers: one copy, and the original stays alive with its id.
        return kept.setdefault(id(leaf), (leaf, leaf.detach().cpu()))[1] if isinstance(leaf, Tensor) else leaf

    def noted(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if index != len(calls):
                raise UnsupportedModel(f"call {len(calls) + 1} of one pass is of layer {index}, counted from 0; {once}")
            states, kwargs = taken_apart(forward, args, kwargs)
            # Each layer gets what it shares with others anew, when it runs.
            calls.append(tree_map(on_cpu, kwargs | dict.fromkeys({ARGUMENT} & kwargs.keys())))
            if first and states.shape != first[0].shape:
                raise UnsupportedModel(
                    f"layer {index} of {trunk.name}, counted from 0, gets states {list(states.shape)} where the first got "
                    f"{list(first[0].shape)} (logits_to_keep, say); give batches without it, or load the model whole."
                )
            if index == 0:
                first.append(states)
                alone.append(states_of(forward(states, **kwargs))[1])
            over.append(index)
            return states if alone[0] else (states,)

        return stand_in

    def behind(module: nn.Module, _args: Any) -> None:
        if len(over) == len(trunk.layers) and module not in trunk.layers:
            raise _Entered

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(behind).remove)
        for index, layer in enumerate(trunk.layers):
            stack.enter_context(replaced_forward(layer, noted(index, layer.forward)))
        try:
            run()
        except _Entered:
            pass
        except (IndexError, ValueError, TypeError) as error:
            if not calls or alone[0]:
                raise
            raise UnsupportedModel(
                f"the layers of {trunk.name} give on more than the states (a position bias, say); load the model whole instead of "
                f"streaming it ({error})."
            ) from error
    if len(over) < len(trunk.layers):
        raise UnsupportedModel(f"one pass makes {len(over)} calls of layers; {once}")
    return Entry(first[0].detach(), tuple(calls), alone[0])


@contextmanager
def leaving(trunk: Trunk, states: Tensor, alone: bool) -> Iterator[None]:
    """Inside the block a pass of the model skips all layers and goes on behind the last one with `states`."""

    def stand_in(*_args: Any, **_kwargs: Any) -> Any:
        return states if alone else (states,)

    with ExitStack() as stack:
        for layer in trunk.layers:
            stack.enter_context(replaced_forward(layer, stand_in))
        yield


def taken_apart(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """(states, other arguments by name) of a layer's call. A cache is left out: each layer may run more than once."""
    given = without_cache(forward, args, kwargs)
    return given.pop(next(iter(signature(forward).parameters))), given


def states_of(returned: Any) -> tuple[Tensor, bool]:
    """(states, whether they come without a tuple around them) that a layer returned."""
    return (returned, True) if isinstance(returned, Tensor) else (returned[0], False)
