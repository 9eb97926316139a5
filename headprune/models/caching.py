"""Which attentions of a model keep the keys and values of earlier tokens: those of encoders keep none."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from headprune.models.cached import CachedFeatures
from headprune.models.emptied import CACHES
from headprune.models.site import AttentionSite
from headprune.models.tokens import encoder_of, inputs_of, is_inside, model_around


def caching_sites(model: nn.Module, sites: Iterable[AttentionSite]) -> list[AttentionSite]:
    """Those of `sites` that fill a cache: outside of the encoder of an encoder-decoder, in a part of `model` that takes a cache,
    but for those of a layer that says that it decodes nothing (BERT's can be either)."""
    encoder = encoder_of(model)
    return [site for site in sites if not is_inside(site.name, encoder) and caches(model, site)]


def with_what_is_cached(model: nn.Module, sites: list[AttentionSite]) -> list[AttentionSite]:
    """`sites`, of which those that fill no cache beside others that do have nothing in one: the encoder of an encoder-decoder, what
    looks at pictures for a decoder."""
    filled = {site.name for site in caching_sites(model, sites)}
    return [site if not filled or site.name in filled else replace(site, cached=CachedFeatures()) for site in sites]


def caches(model: nn.Module, site: AttentionSite) -> bool:
    around = model_around(model, site.name)
    if around is None:  # no model of transformers
        taken = {*inspect.signature(model.forward).parameters, *inspect.signature(site.module.forward).parameters}
        return not taken.isdisjoint({*CACHES, "cache", "kv_cache", "use_cache"})
    steps = [end for end, letter in enumerate(site.name) if letter == "."]
    path = [site.dispatcher, *(model.get_submodule(site.name[:end]) for end in steps)]
    return all(getattr(part, "is_decoder", True) for part in path) and not inputs_of(around).isdisjoint(CACHES)
