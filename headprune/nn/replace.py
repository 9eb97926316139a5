"""Swaps every torch.nn.MultiheadAttention of a model for a VariableHeadAttention with the same weights; attentions of other kinds
that compute past their own projections get a forward of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch
from torch import nn

from headprune.arguments import check_arguments
from headprune.nn.attention import VariableHeadAttention
from headprune.nn.given import out_of_inference_mode, plain_module, refuse_wrapped
from headprune.nn.weights import UNDO, beside_weights, torch_parameter

P = ParamSpec("P")
R = TypeVar("R")
OwnForward = Callable[[nn.Module], Callable[[], None] | None]
BY_HAND = "where it computes the same, put headprune.nn.VariableHeadAttention.from_torch(layer) in its place"
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
Shared = dict[tuple[int, str], nn.Parameter]  # a parameter of torch's layers by its id, and the part of it -> ours
_own_forwards: list[OwnForward] = []
_own_layers: list[OwnForward] = []


def register_own_forward(give: OwnForward) -> OwnForward:
    """`give(module)` gives an attention whose stock forward computes past its own projections another, through them, and returns
    what puts the stock one back; None where the module is of another kind, or has one already."""
    _own_forwards.append(give)
    return give


def register_own_layers(give: OwnForward) -> OwnForward:
    """As `register_own_forward`, for an attention that lacks linear layers: it has them only while heads are asked for, and what
    was done to them then stays (XLNet)."""
    _own_layers.append(give)
    return give


@out_of_inference_mode()
def replace_multihead_attention(model: nn.Module) -> nn.Module:
    """`model` with VariableHeadAttention in place of every torch.nn.MultiheadAttention, in place; the outputs stay the same.

    A layer that stands in several places stays shared, and weights that several layers share too. Forward and backward hooks of
    a layer go on. Left alone are subclasses and layers with a forward set by hand, which may compute something else, and layers
    whose weights a mask, parametrisation or adapter makes. Where `model` itself is such a layer the new one is returned. An
    optimizer made before holds the old parameters. WavLM's attentions, which hand their weights to torch's function, stay and
    compute the same through their projections.
    """
    check_arguments(replace_multihead_attention, locals())
    refuse_wrapped(model)
    if isinstance(model, nn.MultiheadAttention) and not kept_from_swap(model):
        return swapped_in(model, {})
    swap(model)
    return model


@contextmanager
def own_attention(model: nn.Module, keep: bool = False) -> Iterator[nn.Module]:
    """Inside the block `replace_multihead_attention(model)` holds, so that the heads of plain torch models can be reached.

    Afterwards torch's own layers, which kept their weights, are back; with keep=True only where the block fails.
    """
    with ExitStack() as stack:
        with out_of_inference_mode():
            stack.callback(give_layers(model))
            undo = swap(model)
        try:
            yield model
        except BaseException:
            undo()
            raise
        if not keep:
            undo()


@contextmanager
def through_modules() -> Iterator[None]:
    """Inside the block torch's encoder layers call their parts where no gradient is asked for too: their fused kernel reads the
    weights, past what stands around them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def give_layers(model: nn.Module) -> Callable[[], None]:
    """Gives the attentions below `model` layers that lack such; returns what takes them away, with what they then hold."""
    with ExitStack() as undo:
        for change in (give(module) for module in list(model.modules()) for give in _own_layers):
            if change is not None:
                undo.callback(change)
        return undo.pop_all().close


def on_own_attention(change: Callable[P, R]) -> Callable[P, R]:
    """`change(model, ...)` run with `own_attention(model)`, which stays; with dry_run=True it does not. `model` may be wrapped by
    torch.compile, and the caller under torch.inference_mode, in which no weights of a model that lives on are made."""

    @wraps(change)
    def run(*args: P.args, **options: P.kwargs) -> R:
        given: Any = args[0] if args else options.get("model")
        model = plain_module(given)
        refuse_wrapped(model)
        rest: Any = (model, *args[1:]) if args else ()
        named: Any = options if args else {**options, "model": model}
        with out_of_inference_mode(), own_attention(model, keep=not options.get("dry_run", False)):
            return change(*rest, **named)

    return run


def restore_multihead_attention(model: nn.Module) -> None:
    """Every VariableHeadAttention below `model` becomes a torch.nn.MultiheadAttention with its weights, in place.

    Raises InvalidInput where one cannot be that.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is VariableHeadAttention:
                made[child] = made[child] if child in made else child.to_torch()
                setattr(module, name, made[child])


def swap(model: nn.Module) -> Callable[[], None]:
    """Swaps the layers below `model`; returns what puts the old ones back."""
    swapped: dict[nn.Module, VariableHeadAttention] = {}
    shared: Shared = {}
    with ExitStack() as undo:
        for module in list(model.modules()):
            for change in filter(None, (give(module) for give in _own_forwards)):
                undo.callback(change)
            for name, child in list(module._modules.items()):  # named_children() leaves out a second name of a shared layer
                if isinstance(child, nn.MultiheadAttention) and not kept_from_swap(child):
                    if child not in swapped:
                        swapped[child] = swapped_in(child, shared)
                    undo.callback(put_back, module, name, child)
                    setattr(module, name, swapped[child])
        # Else padded batches reach the layers as nested tensors, for torch's own kernel.
        for encoder in model.modules():
            if takes_nested_tensors(encoder):
                undo.callback(setattr, encoder, "use_nested_tensor", True)
                encoder.use_nested_tensor = False
        return undo.pop_all().close


def kept_from_swap(layer: nn.MultiheadAttention) -> str | None:
    """Why `layer` keeps its place, and what to do about it; None where it is swapped."""
    beside = beside_weights(layer)
    if beside is not None:
        return f"holds {beside} beside its weights; {UNDO}"
    if type(layer) is not nn.MultiheadAttention:
        return f"is a subclass of torch.nn.MultiheadAttention, whose forward may be another; {BY_HAND}"
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):  # accelerate's computes the same
        return f"has a forward that was set by hand, which may be another; {BY_HAND}"
    return None


def swapped_in(layer: nn.MultiheadAttention, shared: Shared) -> VariableHeadAttention:
    """What takes the place of `layer`: with its hooks (the very dictionaries, in which handles remove them), and with the weights
    that it shares with others."""
    new = VariableHeadAttention.from_torch(layer)
    for hooks in HOOKS:
        setattr(new, hooks, getattr(layer, hooks))
    for name, parameter in list(new.named_parameters()):
        first = shared.setdefault((id(torch_parameter(layer, name)), name), parameter)
        owner, _, attribute = name.rpartition(".")
        setattr(new.get_submodule(owner), attribute, first)
    return new


def put_back(module: nn.Module, name: str, layer: nn.MultiheadAttention) -> None:
    """`layer` in the mode of what stood in its place."""
    training = module.get_submodule(name).training
    setattr(module, name, layer.train(training))


def takes_nested_tensors(module: nn.Module) -> TypeGuard[nn.TransformerEncoder]:
    """A torch.nn.TransformerEncoder that would, and has swapped layers."""
    if not isinstance(module, nn.TransformerEncoder) or not module.use_nested_tensor:
        return False
    return any(type(part) is VariableHeadAttention for part in module.modules())
