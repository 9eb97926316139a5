"""A pruned transformers model: the stock class, built with the heads that its config lists.

headprune writes this file beside the weights, so that `AutoModel*.from_pretrained(folder, trust_remote_code=True)` works
with nothing but transformers and torch. `HeadPrunedX` is transformers' X. Where headprune is installed it cuts the heads and
its kernels run layers whose groups differ in size; else the `layout` in the config's `headprune` section says which parameters
are smaller, which attributes differ and which modules have another forward (BEHAVIOURS), and layers whose groups differ run
through the stock attention on expanded keys and values.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprune.models.behaviour import behave
from headprune.models.convbert_forward import OwnConvBert
from headprune.models.emptied import (
    Emptied,
    EmptiedAlbert,
    EmptiedAlone,
    EmptiedAsAsked,
    EmptiedBloom,
    EmptiedConv1D,
    EmptiedGraniteSpeech,
    EmptiedLinear,
    EmptiedOnDemand,
    EmptiedOpenAI,
    EmptiedPooled,
    EmptiedPooledAlone,
    EmptiedTimm,
    EmptiedWithBias,
)
from headprune.models.emptied_sharing import EmptiedGiver, EmptiedReader
from headprune.models.fsmt_forward import EmptiedFsmt, OwnFsmt
from headprune.models.ibert_forward import EmptiedIBert, EmptiedQuantLinear
from headprune.models.led_forward import EmptiedLedDecoder, OwnLedDecoder, OwnTrOCR
from headprune.models.levit_forward import EmptiedSmaller
from headprune.models.longformer_forward import EmptiedLongformer, OwnLongformer
from headprune.models.longt5_forward import BlockPositions, EmptiedBlocks
from headprune.models.own_head_dim import OwnHeadDim
from headprune.models.own_positions import GroupedFalcon, OwnPositions, PositionsThird
from headprune.models.own_width import OwnWidth, OwnWidthProjected
from headprune.models.paged import batched_continuously, with_cached
from headprune.models.prophetnet_forward import EmptiedNgram, EmptiedProphetNet, OwnNgram, OwnProphetNet
from headprune.models.quarters import QuarteredHeads
from headprune.models.reduced_forward import OwnReduced
from headprune.models.selection import PicksHeads
from headprune.models.switched import SwitchesAttention
from headprune.models.t5_positions import EmptiedT5, SharedPositions
from headprune.models.wavlm_forward import EmptiedWavLM, OwnWavLM
from headprune.models.window_forward import EmptiedWindows, OwnWindows

try:
    import headprune  # registers attn_implementation="headprune"
except ImportError:
    headprune = None  # type: ignore[assignment]  # asked below

PREFIX = "HeadPruned"
EXPANDED = "headprune_expanded"
BEHAVIOURS = {
    kind.__name__: kind
    for kind in (
        BlockPositions, Emptied, EmptiedAlbert, EmptiedAlone, EmptiedAsAsked, EmptiedBlocks, EmptiedBloom, EmptiedConv1D,
        EmptiedFsmt, EmptiedGiver, EmptiedGraniteSpeech, EmptiedIBert, EmptiedLedDecoder, EmptiedLinear, EmptiedLongformer,
        EmptiedNgram, EmptiedOnDemand, EmptiedOpenAI, EmptiedPooled, EmptiedPooledAlone, EmptiedProphetNet, EmptiedQuantLinear,
        EmptiedReader, EmptiedSmaller, EmptiedT5, EmptiedTimm, EmptiedWavLM, EmptiedWindows, EmptiedWithBias, GroupedFalcon,
        OwnConvBert, OwnFsmt, OwnHeadDim, OwnLedDecoder, OwnLongformer, OwnNgram, OwnPositions, OwnProphetNet, OwnReduced,
        OwnTrOCR, OwnWavLM, OwnWidth, OwnWidthProjected, OwnWindows, PicksHeads, PositionsThird, QuarteredHeads,
        SharedPositions, SwitchesAttention,
    )
}  # fmt: skip
# Ways to compute the same attention; any other name is an engine's own, which takes equal groups alone.
EXCHANGEABLE = ("eager", "sdpa", "flex_attention", "flash_attention", "headprune")
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_classes: dict[str, type] = {}


def __getattr__(name: str) -> type:
    """HeadPrunedX, or X, as transformers names it when it saves the model without headprune."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    name = PREFIX + stock.__name__
    if name not in _classes:
        _classes[name] = pruned_class(name, stock, __name__)
    return _classes[name]


def pruned_class(name: str, stock: Any, module: str) -> type:
    """`stock` whose instances are built with the heads that their config lists. It is found as `name` in `module`, but called like
    `stock`: by that a Trainer with label smoothing and pipelines tell a language model from others."""

    # Without annotations: vLLM checks arguments against them, and here they are strings.
    def __init__(self, config, *args, **options):  # type: ignore[no-untyped-def]
        section, chosen = config.headprune, config._attn_implementation
        del config.headprune  # what is built first is the whole original
        with whole(config):
            stock.__init__(self, config, *args, **options)
        section = about_class(self, section)
        if headprune is not None and section.get("sites"):
            kept = {name: site["kept"] for name, site in section["sites"].items()}
            headprune.cut(self, renamed(self, kept), verify=False)
        elif section.get("layout") is not None:
            shrink(self, section["layout"])
        else:
            raise ImportError(f"{name} has layers that only headprune can build here: pip install headprune.")
        config.headprune = section
        say_counts(config)
        if any_ragged(self):
            use_ragged_attention(self, chosen)

    def init_continuous_batching(self, *args, **options):  # type: ignore[no-untyped-def]
        return batched_continuously(self, lambda: stock.init_continuous_batching(self, *args, **options))

    # What transformers reads off a class's module and name is to be what it reads off the stock class.
    members = {"__init__": __init__, "__module__": module, "__qualname__": name, "is_custom_code": classmethod(lambda cls: False)}
    if hasattr(stock, "init_continuous_batching"):
        members["init_continuous_batching"] = init_continuous_batching
    for ability in ("attn", "experts"):
        question = f"_can_set_{ability}_implementation"
        if hasattr(stock, question):
            members[f"{question}_cached_value"] = getattr(stock, question)()
    return type(stock.__name__, (stock,), members)


@contextlib.contextmanager
def whole(config: Any) -> Iterator[Any]:
    """Inside the block `config` describes the original: layers are built alike, and made smaller afterwards."""
    spec = None if differs_by_itself(config) else config.__dict__.pop("_heterogeneity_spec", None)
    try:
        yield config
    finally:
        if spec is not None:
            config.__dict__["_heterogeneity_spec"] = spec


def differs_by_itself(config: Any) -> bool:
    """Whether its `per_layer_config` says how the original's layers differ; what a cut writes there comes with leave to read the
    counts of the whole."""
    return "_heterogeneity_spec" in config.__dict__ and not config.__dict__.get("allow_global_per_layer_attribute_access")


def say_counts(config: Any) -> None:
    """Adds the counts by transformers' names where the config has its own (GPT-2's n_layer): a Trainer that goes on from a
    checkpoint reads its config.json as one of no family, which asks for them beside `per_layer_config`."""
    forget_counts(config)
    if "_heterogeneity_spec" in config.__dict__:
        config.__dict__.update({name: getattr(config, name) for name in COUNTS if name in config.attribute_map})


def forget_counts(config: Any) -> None:
    for name in COUNTS:
        if name in config.attribute_map:
            config.__dict__.pop(name, None)


def about_class(model: Any, section: dict[str, Any]) -> dict[str, Any]:
    """`section` as far as it is about `model`, which may be of a class that has a half alone of what was saved (T5's encoder)."""
    if type(model).__name__ in (model.config.architectures or ()):
        return section
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

    def has(name: str) -> bool:
        half = name.removeprefix(prefix).split(".")[0]
        return half in modules or prefix + half in modules

    parts = {part: section[part] for part in ("sites", "layout") if section.get(part)}
    return section | {part: {name: entry for name, entry in entries.items() if has(name)} for part, entries in parts.items()}


def renamed(model: nn.Module, entries: dict[str, Any]) -> dict[str, Any]:
    """`entries` by the names that their modules have in `model`: a folder saved from the base model also loads with a head on
    it, and the other way round."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    found = {}
    for name, entry in entries.items():
        here = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in modules), None)
        if here is None:
            raise ValueError(f"{type(model).__name__} has no module {name}, which the headprune section of its config names.")
        found[here] = entry
    return found


def shrink(model: nn.Module, layout: dict[str, Any]) -> None:
    """Gives the modules that `layout` names their shapes, attributes, forwards and head maps; the values are set by loading."""
    for name, entry in renamed(model, layout).items():
        module: Any = model.get_submodule(name)
        if "modules" in entry:
            del module[entry["modules"] :]
        if "behaviour" in entry:
            behave(module, BEHAVIOURS[entry["behaviour"]])
        for parameter, shape in entry.get("shapes", {}).items():
            old = getattr(module, parameter)
            setattr(module, parameter, nn.Parameter(of_shape(old.detach(), shape), requires_grad=old.requires_grad))
        for buffer, shape in entry.get("buffers", {}).items():
            setattr(module, buffer, of_shape(getattr(module, buffer), shape))
        for attribute, value in entry.get("attributes", {}).items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
        if entry.get("shown"):
            module.extra_repr = functools.partial(str, entry["shown"])  # what print(model) says of its heads
        if "head_map" in entry:
            module.kv_of_query = tuple(entry["head_map"]["kv_of_query"])
            module.headprune_kv_heads = entry["head_map"]["kv_heads"]
            if headprune is not None:
                module.head_map = headprune.HeadMap(**entry["head_map"])
        if "config" in entry:
            module.config = LayerConfig(module.config, entry["config"])


def of_shape(old: Tensor, shape: Sequence[int]) -> Tensor:
    """`old` cut down; zeros where it is smaller, as it is where an export repeated key/value heads."""
    new = old.new_zeros(tuple(shape))
    common = tuple(slice(min(sizes)) for sizes in zip(shape, old.shape))
    new[common] = old[common]
    return new


class LayerConfig:
    """`shared`, the model's config, with some values of one layer's own."""

    def __init__(self, shared: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(shared=shared, own=own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def is_ragged(module: nn.Module) -> bool:
    head_map: Any = getattr(module, "head_map", None)
    kv_of_query = getattr(head_map, "kv_of_query", getattr(module, "kv_of_query", ()))
    kv_heads = getattr(head_map, "kv_heads", getattr(module, "headprune_kv_heads", 0))
    return len({kv_of_query.count(kv) for kv in range(kv_heads)}) > 1


def any_ragged(model: nn.Module) -> bool:
    return any(is_ragged(module) for module in model.modules())


def use_ragged_attention(model: Any, chosen: str | None) -> None:
    """chosen: the attention that the model was asked to be built with; transformers' default becomes headprune's kernels."""
    if chosen is not None and not chosen.startswith(EXCHANGEABLE):
        raise ValueError(
            f"this model has ragged groups, which attention {chosen!r} cannot run. `headprune export --to vllm` (or another "
            "target) makes the groups equal without changing the outputs."
        )
    if headprune is not None and model._can_set_attn_implementation():
        model.set_attn_implementation("headprune" if chosen is None else chosen)


def expanded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function on one key/value head per query head."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    functions: Any = ALL_ATTENTION_FUNCTIONS
    function = functions.get_interface(module.config.shared._attn_implementation.removeprefix("paged|"), eager)
    key, value = with_cached(module, key, value, arguments)
    index = torch.tensor(module.kv_of_query, device=key.device)
    key, value = key.index_select(1, index), value.index_select(1, index)
    output, weights = function(module, query, key, value, attention_mask, **arguments)
    return output, weights


if headprune is None:
    AttentionInterface.register(EXPANDED, expanded_attention)
