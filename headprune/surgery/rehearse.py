"""Tries a cut before it is made: on one small input, each attention cut must give what it gives with those heads gated.

Both are computed in fp32, whatever the model's dtype, on stand-ins for the attention (headprune.surgery.stand_in), one
attention at a time: a failure leaves the model as it is, and memory grows by one attention in fp32 and the same cut.
"""

from __future__ import annotations

import inspect
import logging
from collections import UserDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from headprune.errors import UnsupportedModel
from headprune.models.gating import gate_columns, output_input_hook
from headprune.models.site import AttentionSite
from headprune.models.stream import first_tensor
from headprune.models.tested import is_tested
from headprune.models.tiny_inputs import tiny_inputs
from headprune.models.uncompiled import uncompiled
from headprune.surgery.stand_in import on_stand_ins, same, widened

log = logging.getLogger("headprune")
TOLERANCE = 1e-4  # relative to the largest value: cutting reorders sums. 16 steps of the dtype where fp32 cannot be used

FIXED = (
    "Its forward must take the size of a head from __init__, not as width / num_heads, and join the heads with flatten or "
    "reshape(..., -1); or put headprune.nn.VariableHeadAttention in its place."
)

Run = Callable[[nn.Module], Any]
Cut = tuple[AttentionSite, tuple[int, ...]]  # a site and its query heads that are kept


@dataclass(frozen=True)
class Call:
    """What an attention received when heads were gated before it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def made_of(self, of: Callable[[Tensor], Tensor]) -> Call:
        args, kwargs = tree_map(lambda value: of(value) if isinstance(value, Tensor) else value, (self.args, self.kwargs))
        return Call(args, kwargs)

    @property
    def usable(self) -> bool:
        """Whether the states that it received, its first tensor, hold no infinity or NaN."""
        states = first_tensor((*self.args, *self.kwargs.values()))
        return states is not None and bool(states.isfinite().all())


@torch.no_grad()
def rehearse(
    model: nn.Module,
    cuts: Sequence[Cut],
    cut_site: Callable[[AttentionSite, tuple[int, ...]], None],
    run: Run | None,
    verify: bool,
    otherwise: Run | None = None,
) -> None:
    """Checks every cut (site, kept query heads) of `model` by `cut_site` on a stand-in; the model stays as it is.

    run: one forward pass; default `tiny_inputs`. otherwise: another, made where that does not reach every site. With verify=False
    only sites that are not `proven` are checked.
    Raises UnsupportedModel where a cut fails or gives something else than gating, and where no forward pass reached an attention of
    a kind that is not tested (headprune.models.tested). Of one that is, the log says that it was not checked.
    """
    cuts = [(site, kept) for site, kept in cuts if verify or not site.proven]
    if not cuts or any(parameter.is_meta for parameter in model.parameters()):
        return
    calls: dict[str, Call] = {}
    for forward in (run or default_run(model), otherwise):
        if forward is not None and any(site.name not in calls for site, _ in cuts):
            try:
                gated_calls(model, cuts, forward, calls)
            except Exception as error:  # whatever a model raises on an input that it was not made for
                log.warning("%s does not run on an input of the check before a cut: %s", type(model).__name__, error)
    reached = [(site, kept) for site, kept in cuts if site.name in calls and calls[site.name].usable]
    for site, kept in reached:
        check_cut(site, kept, cut_site, calls[site.name])
    refuse_unreached([site for site, _ in cuts if all(site is not other for other, _ in reached)])


def refuse_unreached(sites: Sequence[AttentionSite]) -> None:
    """UnsupportedModel where a site is not of a tested kind; a line in the log that names the others."""
    described = [f"{site.name} ({type(site.module).__name__})" for site in sites]
    for site, name in zip(sites, described):
        if not site.proven:
            raise UnsupportedModel(
                f"{name} is not a known attention, and no forward pass reached it to prove that cutting it is safe. "
                "Give hp.cut run=, a forward pass that reaches it, or hp.prune calibration batches, or write an adapter "
                "(CONTRIBUTING.md)."
            )
        if not is_tested(site):
            raise UnsupportedModel(
                f"{name} is of a kind that headprune was not tested on, and no forward pass reached it to check that cutting it is "
                "right. Give run=, a forward pass that reaches it, or calibration batches; verify=False cuts it unchecked."
            )
    if sites:
        log.warning("not checked before the cut, because no forward pass reached them: %s", ", ".join(described))


def default_run(model: nn.Module) -> Run | None:
    inputs = tiny_inputs(model)
    if inputs is None:
        return None
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return lambda model: model(**inputs)


def gated_calls(model: nn.Module, cuts: Sequence[Cut], run: Run, calls: dict[str, Call]) -> None:
    """Adds to `calls`, by site name, the first call of each site in a forward pass in which all removed heads are gated; those
    before a failure too."""
    training = {module: module.training for module in model.modules()}
    with uncompiled(model), ExitStack() as stack:
        for site, kept in cuts:
            stack.enter_context(gated_site(site, kept))
            stack.callback(site.module.register_forward_pre_hook(received(calls, site.name), with_kwargs=True).remove)
        model.eval()
        try:
            run(model)
        finally:
            for module, was in training.items():
                module.training = was


def gated_site(site: AttentionSite, kept: Sequence[int]) -> AbstractContextManager[None]:
    """A context in which the site's heads but `kept` are gated."""
    open_heads = torch.zeros(site.head_map.query_heads)
    open_heads[list(kept)] = 1.0
    return output_input_hook(site, gate_columns(site.by_column(open_heads)))


def received(calls: dict[str, Call], name: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, Call(args, {key: as_received(value) for key, value in kwargs.items()}))

    return hook


def as_received(value: Any) -> Any:
    """An argument that later calls, and those of the check, leave alone: no cache, and what layers share in a dict of its own."""
    if isinstance(value, Cache):
        return None
    return dict(value) if type(value) is dict or isinstance(value, UserDict) else value


def check_cut(site: AttentionSite, kept: tuple[int, ...], cut_site: Callable[..., Any], call: Call) -> None:
    """UnsupportedModel unless a stand-in for the site, cut, gives on `call` what another gives whose heads are gated."""
    described = f"{site.name} ({type(site.module).__name__})"
    with torch.autocast(site.output.module.weight.device.type, enabled=False):
        whole, call, gated = gated_stand_in(site, kept, call)
        twin = on_stand_ins(whole)
        try:
            cut_site(twin, kept)
            twin.module.eval()  # LeViT's returns nothing
            returned = twin.module(*call.args, **call.kwargs)
        except UnsupportedModel:
            raise
        except Exception as error:
            way_out = "" if site.proven else f" {FIXED}"
            raise UnsupportedModel(f"{described} cannot be cut: without those heads it fails with {error!r}.{way_out}") from error
    streams = len(site.outputs)
    all_found, all_expected = first_tensors(returned, streams), first_tensors(gated, streams)
    if not len(all_found) == len(all_expected) == streams or form(returned) != form(gated):
        raise UnsupportedModel(f"{described} cannot lose these heads: it would return {form(returned)}, not {form(gated)}.")
    for found, expected in zip(all_found, all_expected):
        allowed = max(TOLERANCE, 16 * torch.finfo(found.dtype).eps) * expected.abs().max().clamp(min=1e-3)
        if found.shape != expected.shape or not (found - expected).abs().max() <= allowed:
            difference = "another shape" if found.shape != expected.shape else f"{(found - expected).abs().max():.1e} off"
            raise UnsupportedModel(
                f"{described} gives something else when heads are cut than when they are gated ({difference}): its heads are not "
                "where they seem to be, or they depend on each other. It cannot be pruned."
            )


def gated_stand_in(site: AttentionSite, kept: tuple[int, ...], call: Call) -> tuple[AttentionSite, Call, Any]:
    """The site on a stand-in in fp32, `call` in fp32, and what the one returns for the other with all heads but `kept` gated.

    A proven attention that runs in its own dtype alone (FlashAttention, say) stays in that; another is refused.
    """
    try:
        return called(on_stand_ins(site, widened), kept, call.made_of(widened))
    except Exception as error:
        if not site.proven:
            raise UnsupportedModel(
                f"{site.name} ({type(site.module).__name__}) is not a known attention and does not run in fp32, in which its cut "
                f"would be compared with gating: {error!r}. Load the model with dtype=torch.float32 to prune it."
            ) from error
        log.warning("%s does not run in fp32; its cut is checked in %s only: %s", site.name, site.output.module.weight.dtype, error)
        return called(on_stand_ins(site, same), kept, call)


def called(site: AttentionSite, kept: tuple[int, ...], call: Call) -> tuple[AttentionSite, Call, Any]:
    with gated_site(site, kept):
        site.module.eval()
        return site, call, site.module(*call.args, **call.kwargs)


def first_tensors(returned: Any, count: int) -> list[Tensor]:
    """The first `count` tensors in what a module returned; fewer where there are fewer."""
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)][:count]


def form(returned: Any) -> str:
    return f"{len(returned)} values" if isinstance(returned, (tuple, list)) else type(returned).__name__
