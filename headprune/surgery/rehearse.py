"""Tries a cut before it is made: on one small input, each attention cut must give what it gives with those heads gated.

The cut is tried on a stand-in for the attention (its own modules, the same weights), one attention at a time, so that a
failure leaves the model as it is and memory grows by one pruned attention at most.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from headprune.errors import UnsupportedModel
from headprune.models.gating import gate_columns, output_input_hook
from headprune.models.site import AttentionSite
from headprune.models.stream import first_tensor
from headprune.models.tiny_inputs import tiny_inputs

log = logging.getLogger("headprune")
TOLERANCE = 1e-4  # relative to the largest value; 16 steps of the dtype where that is more: cutting reorders sums


@dataclass
class Call:
    """What an attention received and gave when its heads were gated."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any = None

    @property
    def output(self) -> Tensor | None:
        return first_output(self.returned)


@torch.no_grad()
def rehearse(
    model: nn.Module,
    cuts: Sequence[tuple[AttentionSite, tuple[int, ...]]],
    cut_site: Callable[[AttentionSite, tuple[int, ...]], None],
    run: Callable[[nn.Module], Any] | None,
    verify: bool,
) -> None:
    """Checks every cut (site, kept query heads) of `model` by `cut_site` on a stand-in; the model stays as it is.

    run: one forward pass; default `tiny_inputs`. Without either, and with verify=False, only sites that are not `proven` need
    the check; they are refused then. Raises UnsupportedModel where a cut fails or gives something else than gating.
    """
    guessed = [site for site, _ in cuts if not site.proven]
    if not cuts or not (verify or guessed) or any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        calls = gated_calls(model, cuts, run or default_run(model))
    except Exception as error:  # whatever a model raises on an input that it was not made for
        log.warning("the cut is not checked: %s does not run on the check's input: %s", type(model).__name__, error)
        calls = {}
    for site, kept in cuts:
        call = calls.get(site.name)
        if call is not None and call.output is not None and call.output.isfinite().all():
            check_cut(site, kept, cut_site, call)
        elif not site.proven:
            raise UnsupportedModel(
                f"{site.name} ({type(site.module).__name__}) is not a known attention, and no forward pass reached it to prove "
                "that cutting it is safe. Give calibration batches, or write an adapter (CONTRIBUTING.md)."
            )


def default_run(model: nn.Module) -> Callable[[nn.Module], Any]:
    inputs = tiny_inputs(model)
    if inputs is None:
        return lambda model: None
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return lambda model: model(**inputs)


def gated_calls(model: nn.Module, cuts: Sequence[Any], run: Callable[[nn.Module], Any]) -> dict[str, Call]:
    """Site name -> its first call in a forward pass in which all removed heads are gated."""
    calls: dict[str, Call] = {}
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for site, kept in cuts:
            open_heads = torch.zeros(site.head_map.query_heads)
            open_heads[list(kept)] = 1.0
            stack.enter_context(output_input_hook(site, gate_columns(open_heads[site.head_of_column()])))
            stack.callback(site.module.register_forward_pre_hook(received(calls, site.name), with_kwargs=True).remove)
            stack.callback(site.module.register_forward_hook(given(calls, site.name)).remove)
        model.eval()
        try:
            run(model)
        finally:
            for module, was in training.items():
                module.training = was
    return calls


def received(calls: dict[str, Call], name: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
        calls.setdefault(name, Call(args, kept))

    return hook


def given(calls: dict[str, Call], name: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if calls[name].returned is None:
            calls[name].returned = output

    return hook


def check_cut(site: AttentionSite, kept: tuple[int, ...], cut_site: Callable[..., Any], call: Call) -> None:
    """UnsupportedModel unless a stand-in for the site, cut, gives `call.output`."""
    twin = on_stand_ins(site)
    described = f"{site.name} ({type(site.module).__name__})"
    try:
        cut_site(twin, kept)
        returned = twin.module.eval()(*call.args, **call.kwargs)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(f"{described} cannot be cut: without those heads it fails with {error!r}.") from error
    found, expected = first_output(returned), call.output
    if found is None or expected is None or form(returned) != form(call.returned):
        raise UnsupportedModel(f"{described} cannot lose these heads: it would return {form(returned)}, not {form(call.returned)}.")
    allowed = max(TOLERANCE, 16 * torch.finfo(found.dtype).eps) * expected.abs().max().clamp(min=1e-3)
    if found.shape != expected.shape or not (found - expected).abs().max() <= allowed:
        difference = "another shape" if found.shape != expected.shape else f"{(found - expected).abs().max():.1e} off"
        raise UnsupportedModel(
            f"{described} gives something else when heads are cut than when they are gated ({difference}): its heads are not "
            "where they seem to be, or they depend on each other. It cannot be pruned."
        )


def first_output(returned: Any) -> Tensor | None:
    return first_tensor(returned if isinstance(returned, tuple) else (returned,))


def form(returned: Any) -> str:
    return f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__


def on_stand_ins(site: AttentionSite) -> AttentionSite:
    """The same site on a stand-in for its module. All that it cuts must lie below that module."""
    made: dict[nn.Module, nn.Module] = {}
    module = stand_in(site.module, made)
    projections = tuple(replace(part, module=made[part.module]) for part in site.projections)
    extras = tuple(replace(part, module=made[part.module]) for part in site.extras)
    modules = tuple(replace(part, module=made[part.module]) for part in site.head_modules)
    twin = replace(site, module=module, dispatcher=made[site.dispatcher], projections=projections, extras=extras)
    return replace(twin, head_modules=modules)


def stand_in(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same module tree in new module objects, sharing every tensor: what is cut there leaves `module` alone."""
    if module not in made:
        twin = made[module] = type(module).__new__(type(module))
        own = {"_parameters", "_buffers", "_non_persistent_buffers_set"}
        twin.__dict__.update({name: value.copy() if name in own else value for name, value in module.__dict__.items()})
        twin.__dict__["_modules"] = {
            name: child if child is None else stand_in(child, made) for name, child in module._modules.items()
        }
    return made[module]
