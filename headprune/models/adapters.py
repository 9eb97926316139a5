"""How the attentions of a model are found: one adapter per kind of layout, registered by itself."""

from __future__ import annotations

import logging
from functools import cache
from typing import Protocol

from torch import nn

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.behaviour import original_class
from headprune.models.caching import with_what_is_cached
from headprune.models.site import AttentionSite
from headprune.nn.given import plain_module

log = logging.getLogger("headprune")
WAY_OUT = "CONTRIBUTING.md shows how to add one (hp.register_adapter)."
RECOGNISED = (
    "What is recognised without one: a class whose name ends in Attention, with num_heads and linear layers q_proj, k_proj, v_proj "
    "and out_proj, or qkv and proj (or other usual names), and no other weights. Or put headprune.nn.VariableHeadAttention there."
)


class Adapter(Protocol):
    """Recognises one kind of attention module by its structure.

    Where the module slices its own weights the adapter also has `cut(site, kept_query_heads)`, which is called in place of
    the general cut; where it runs ragged groups by itself, in any model, `runs_ragged = True`.

    Where cutting some of its modules would not equal gating them, `inexact(site)` says why in a line, else gives None.

    Where a cut also concerns the attentions that keep all their heads (they read head counts from the model's config, which says
    from then on that layers differ), `beside_cut(site)` is called for each of those.

    Where it recognises what others may know better, `guesses = True`: it is asked last.

    `site` is asked again after a cut, so it must recognise what `after_cut` leaves, without heads too.
    """

    @property
    def name(self) -> str:
        """What it is known by."""

    def site(self, name: str, module: nn.Module) -> AttentionSite | None:
        """The site of `module`, which stands at `name` in its model; None where it is not of this kind."""

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        """Sets what the module's forward reads, once its weights hold the heads of `head_map`: the `kept` query heads of
        `site`, which is as it was before."""


_adapters: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    """Adds `adapter` (headprune.models.adapters.Adapter): from then on attentions of its kind are found and cut. A later one of
    the same name takes the earlier one's place."""
    usable = isinstance(getattr(adapter, "name", None), str) and all(hasattr(adapter, own) for own in ("site", "after_cut"))
    if not usable or isinstance(adapter, type):
        raise InvalidInput(
            f"the adapter is {adapter!r:.80}; expected an object with name, site(name, module) and after_cut(site, head_map, "
            "kept). CONTRIBUTING.md shows one."
        )
    _adapters[adapter.name] = adapter
    return adapter


def attention_sites(model: nn.Module, *, quantised: bool = False) -> list[AttentionSite]:
    """Every attention of `model` that headprune can cut, in the order of its modules.

    quantised: also where torchao or bitsandbytes quantised the weights, which can be measured and not cut; UnsupportedModel
    otherwise.

    What looks like an attention of another kind and is not known (deformable attention, say) keeps all its heads, and a warning
    names it. Raises UnsupportedModel where nothing else is found, or where a kind is known in one place and not in another.
    """
    model = plain_module(model)
    sites: list[AttentionSite] = []
    unknown: list[str] = []
    for name, module in model.named_modules():
        if sites and name.startswith(f"{sites[-1].name}."):  # what is inside a module comes directly behind it
            continue
        # What has no children has no projections; most modules are such.
        site = find_site(name, module) if module._modules else None
        if site is not None:
            sites.append(site)
        elif looks_like_attention(module):
            unknown.append(name)
    # What holds a known attention may be called one too, the whole model for example, whose name is empty.
    unknown = [name for name in unknown if not any(site.name.startswith(f"{name}." if name else "") for site in sites)]
    tell_of(unknown, sites, model)
    packed = None if quantised else next((site.quantised for site in sites if site.quantised), None)
    if packed is not None:
        raise UnsupportedModel(
            f"{packed.name} ({type(packed.module).__name__}) holds quantised weights, which can be scored and evaluated, not cut; "
            "prune the model before it is quantised, by the scores of either."
        )
    return with_what_is_cached(model, sites)


def tell_of(unknown: list[str], sites: list[AttentionSite], model: nn.Module) -> None:
    """UnsupportedModel or a warning, as `attention_sites` says."""
    kinds = {original_class(site.module) for site in sites}
    strange = [name for name in unknown if not sites or original_class(model.get_submodule(name)) in kinds]
    if strange:
        raise UnsupportedModel(f"{type(model).__name__}: no adapter knows {listed(model, strange)}. {WAY_OUT} {RECOGNISED}")
    if unknown:
        warn_once(f"{type(model).__name__}: all heads stay in {listed(model, unknown)}, which no adapter knows. {WAY_OUT}")
    if not sites:
        what = f"no attention that one of the {len(_adapters)} adapters knows"
        raise UnsupportedModel(f"{type(model).__name__} has {what}. {WAY_OUT} {RECOGNISED}")


def listed(model: nn.Module, names: list[str]) -> str:
    """The first of `names` of modules, with their kinds."""
    shown = [f"{name} ({type(model.get_submodule(name)).__name__})".strip() for name in names[:3]]
    return f"{', '.join(shown)}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


@cache
def warn_once(message: str) -> None:
    """Sites are asked for many times in one run."""
    log.warning(message)


def find_site(name: str, module: nn.Module) -> AttentionSite | None:
    found = ((adapter, adapter.site(name, module)) for adapter in known_first())
    adapter, site = next((pair for pair in found if pair[1] is not None), (None, None))
    if adapter is not None and not (isinstance(site, AttentionSite) and isinstance(site.head_map, HeadMap)):
        raise InvalidInput(
            f"adapter {adapter.name!r} gave {site!r:.80} for {name}; expected an hp.AttentionSite with a HeadMap, or None."
        )
    return site


def known_first() -> list[Adapter]:
    return sorted(_adapters.values(), key=lambda adapter: getattr(adapter, "guesses", False))


def adapter_of(site: AttentionSite) -> Adapter:
    """The adapter that found `site`."""
    for adapter in known_first():
        if adapter.site(site.name, site.module) is not None:
            return adapter
    raise UnsupportedModel(f"{site.name} ({type(site.module).__name__}) is not recognised any more; was it changed by hand?")


def looks_like_attention(module: nn.Module) -> bool:
    """A module named as an attention that has linear layers of its own or below."""
    return named_as_attention(module) and any(getattr(child, "weight", None) is not None for child in module.modules())


def named_as_attention(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith(("attention", "attn"))


def head_map_of(dispatcher: nn.Module, query_features: int, kv_features: int, head_dim: int, name: str) -> HeadMap:
    """The head map that surgery left on `dispatcher`, else equal groups derived from the projections' sizes."""
    carried = getattr(dispatcher, "head_map", None)
    if isinstance(carried, HeadMap):
        return carried
    if query_features % head_dim or kv_features % head_dim or (kv_features and query_features % kv_features):
        raise UnsupportedModel(
            f"{name}: {query_features} query and {kv_features} key features do not make equal groups of heads of {head_dim}."
        )
    return HeadMap.uniform(query_features // head_dim, kv_features // head_dim)
