"""Measures how long every attention of a model takes with every number of heads, on this machine."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headprune.attention_interface import NAME
from headprune.errors import InvalidInput
from headprune.evaluation.cost import sequence_length
from headprune.evaluation.data import placed
from headprune.evaluation.latency import synchronize
from headprune.evaluation.machine import machine_name
from headprune.models import attention_sites
from headprune.models.adapters import find_site
from headprune.models.placement import device_of
from headprune.models.site import AttentionSite, Foreign
from headprune.models.uncompiled import uncompiled
from headprune.nn.replace import own_attention
from headprune.planning.latency_table import LatencyTable, key_of
from headprune.scoring.passes import in_eval_mode
from headprune.scoring.site_shape import SiteShape
from headprune.surgery.cut import cut_site

REPEATS = 5


def measure_latency_table(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    repeats: int = REPEATS,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Times a forward pass of each kind of attention in `model`, and of each length that it runs, with 0, 1, ..., all query heads.

    Heads go so that groups shrink evenly: no key/value head goes before the last query head of some group. What is timed are cut
    copies of the attention modules on the very inputs that they receive in `model(**inputs)`, in turn, medians. Each
    torch.nn.MultiheadAttention is timed as the VariableHeadAttention that takes its place when it is pruned.

    Args:
        inputs: for `model(**inputs)`: the batch and length that the latency is wanted for.
        repeats: timed runs of every head count.
        cache: a folder of tables; one of the same machine, sizes of the model, way that its attentions run, inputs' shapes and
            dtype is read instead of measured again.

    Raises InvalidInput where an attention is not reached by the inputs.
    """
    with own_attention(model):
        return measured(model, inputs, repeats, cache, progress)


def measured(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    repeats: int,
    cache: str | Path | None,
    progress: Callable[[int, int], None] | None,
) -> LatencyTable:
    """See `measure_latency_table`."""
    sites = attention_sites(model)
    shapes = {site.name: SiteShape.of(site) for site in sites}
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    setting = (machine_name(device_of(model)), str(next(model.parameters()).dtype))
    given = [(name, tuple(value.shape)) for name, value in inputs.items() if isinstance(value, Tensor)]
    sizes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]  # what is not attention counts too
    runs = getattr(getattr(model, "config", None), "_attn_implementation", None)
    file = cached_file(cache, (*setting, given, [(name, key_of(shape)) for name, shape in shapes.items()], sizes, runs))
    if file is not None and file.exists():
        return LatencyTable.load(file)
    with in_eval_mode(model), torch.inference_mode():
        calls = received(model, sites, inputs)
        keys = keys_of(sites, calls)
        kinds = {keys[site.name]: site for site in reversed(sites)}
        attention = {}
        for done, (key, site) in enumerate(kinds.items()):
            attention[key] = times_of(model, site, calls[site.name], repeats)
            if progress:
                progress(done + 1, len(kinds))
        whole = median_ns(lambda: model(**placed(model, inputs)), device_of(model), max(repeats, 5))
    everything = sum(attention[key][-1] for key in keys.values())
    length = sequence_length(model, sites, inputs) or first.shape[1]
    own = {name: key for name, key in keys.items() if key != key_of(shapes[name])}
    table = LatencyTable(*setting, first.shape[0], length, attention, max(0, whole - everything), own, tuple(keys))
    if file is not None:
        table.save(file)
    return table


def keys_of(sites: list[AttentionSite], calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, str]:
    """Site -> the geometry that its time is of; sites that run other lengths than the first of their geometry say which."""
    keys: dict[str, str] = {}
    first: dict[str, list[tuple[int, ...]]] = {}
    for site in sites:
        args, kwargs = calls[site.name]
        states = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())
        lengths = [tuple(value.shape[:-1]) for value in states if value.dim() == 3 or value.shape[-1:] == (site.hidden_size,)]
        key = key_of(SiteShape.of(site))
        same = first.setdefault(key, lengths) == lengths
        keys[site.name] = key if same else f"{key}, states {' and '.join(str(list(sizes)) for sizes in lengths)}"
    return keys


def times_of(model: nn.Module, site: AttentionSite, call: tuple[tuple[Any, ...], dict[str, Any]], repeats: int) -> tuple[int, ...]:
    """Nanoseconds with 0, 1, ..., all query heads; the copies are run in turn."""
    args, kwargs = call
    order, device = even_order(site), device_of(model)
    copies = [cut_copy(site, order[:count]) for count in range(len(order) + 1)]
    taken: list[list[int]] = [[] for _ in copies]
    for turn in range(repeats + 1):
        for times, module in zip(taken, copies):
            elapsed = elapsed_ns(partial(module, *args, **kwargs), device)
            if turn:  # the first warms up
                times.append(elapsed)
    return tuple(int(torch.tensor(times).median()) for times in taken)


def cut_copy(site: AttentionSite, heads: list[int]) -> nn.Module:
    """The site's module with these heads alone."""
    module = copy.deepcopy(site.module)
    own = find_site(site.name, module)
    assert own is not None  # it was found as `site`
    if len(heads) < own.head_map.query_heads:
        if not own.head_map.keep(heads).is_uniform and hasattr(own.dispatcher, "config"):
            dispatcher: Foreign = own.dispatcher
            dispatcher.config._attn_implementation = NAME
        cut_site(own, tuple(sorted(heads)))
    return module


def even_order(site: AttentionSite) -> list[int]:
    """All query heads: the first of each group, then the second of each, ..."""
    offsets = site.head_map.group_offsets
    rank = {head: head - offsets[kv] for head, kv in enumerate(site.head_map.kv_of_query)}
    return sorted(rank, key=lambda head: (rank[head], head))


def received(
    model: nn.Module, sites: list[AttentionSite], inputs: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each site's module receives in one forward pass, without a cache that would grow from run to run."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, {key: value for key, value in kwargs.items() if "past_key_value" not in key}))

        return hook

    with uncompiled(model), ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(note(site.name), with_kwargs=True).remove)
        model(**placed(model, inputs))
    missing = [site.name for site in sites if site.name not in calls]
    if missing:
        raise InvalidInput(f"{missing[0]} was not reached by the inputs; give inputs that run through it.")
    return calls


def median_ns(run: Callable[[], Any], device: torch.device, repeats: int) -> int:
    run()
    return int(torch.tensor([elapsed_ns(run, device) for _ in range(repeats)]).median())


def elapsed_ns(run: Callable[[], Any], device: torch.device) -> int:
    synchronize(device)
    started = time.perf_counter_ns()
    run()
    synchronize(device)
    return time.perf_counter_ns() - started


def cached_file(cache: str | Path | None, setting: tuple[Any, ...]) -> Path | None:
    if cache is None:
        return None
    return Path(cache) / f"latency-{hashlib.sha256(repr((setting, os.name)).encode()).hexdigest()[:16]}.json"
