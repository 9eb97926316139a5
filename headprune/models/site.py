"""AttentionSite: one attention of a model, and where each of its heads lives in the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.behaviour import original_class
from headprune.models.cached import CachedFeatures
from headprune.models.quantised import is_quantised, plain_weight, weight_shape

Role = Literal["query", "key", "value", "output"]
Kind = Literal["self", "cross"]
# A module as its family wrote it: which attributes it has no type tells; an adapter finds out by asking.
Foreign: TypeAlias = Any
# Linear layers under another name. I-BERT's holds what it rounded last beside its weight.
PLAIN_LINEAR = {"Conv1D", "FalconLinear", "QuantLinear"}


@dataclass(frozen=True)
class ProjectionHeads:
    """The features of one projection that belong to each head.

    `features` [heads, width] numbers output features of `module` (query, key, value) or input features (output):
    query heads for "query" and "output", key/value heads for "key" and "value". A fused projection appears once per role.
    whole: its features all stay when heads go (a norm over all of them still reads them), or another role takes them away;
    `features` says which are used. beside: features of no head, which always stay (those of a feed-forward, in an output
    projection of both).
    """

    role: Role
    name: str
    module: Foreign
    features: Tensor
    whole: bool = False
    beside: Tensor | None = None

    @property
    def per_kv_head(self) -> bool:
        return self.role in ("key", "value")

    @property
    def weight_dim(self) -> int:
        """The dimension of `module.weight` along which the heads lie (nn.Linear holds [out, in], Conv1D [in, out])."""
        return int((self.role == "output") != is_conv1d(self.module))

    @property
    def bias_per_head(self) -> bool:
        return self.role != "output" and getattr(self.module, "bias", None) is not None

    def head_weights(self) -> Tensor:
        """Each head's slice of the weight, [heads, width, other]; a copy."""
        weight = plain_weight(self.module)
        rows = weight if self.weight_dim == 0 else weight.t()
        return rows[self.features.to(weight.device)]

    def features_of(self, heads: Sequence[int]) -> Tensor:
        """Those that stay with `heads`, ascending, int64."""
        own = self.features[list(heads)].flatten()
        return (own if self.beside is None else torch.cat([own, self.beside])).sort().values

    def parameters_per_head(self) -> int:
        """Number of parameters that go with one head."""
        if self.whole:
            return 0
        others = weight_shape(self.module)[1 - self.weight_dim]
        return self.features.shape[1] * (others + int(self.bias_per_head))


@dataclass(frozen=True)
class HeadTensor:
    """What a head has beside its projections (a sink, its own norm, a column of a position table): `width` entries of
    `module.attribute` along `dim`, head after head. The attribute may be a parameter, a buffer or a plain tensor."""

    name: str
    module: nn.Module
    attribute: str
    dim: int = 0
    width: int = 1
    per_kv_head: bool = False

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.module, self.attribute)
        return found

    def features(self, heads: Sequence[int]) -> Tensor:
        """The entries of these heads along `dim`, int64."""
        starts = torch.tensor(list(heads), dtype=torch.long, device="cpu")[:, None] * self.width
        return (starts + torch.arange(self.width, device="cpu")).flatten()

    def parameters_per_head(self) -> int:
        if not isinstance(self.tensor, nn.Parameter):
            return 0
        return self.width * self.tensor.numel() // max(self.tensor.shape[self.dim], 1)


@dataclass(frozen=True)
class HeadModules:
    """A torch.nn.ModuleList `module.attribute` with one module for each head."""

    name: str
    module: nn.Module
    attribute: str
    per_kv_head: bool = False

    def parameters_per_head(self) -> int:
        modules = getattr(self.module, self.attribute)
        return sum(parameter.numel() for parameter in modules[0].parameters()) if len(modules) else 0


@dataclass(frozen=True)
class AttentionSite:
    """One attention in a model.

    `name` is its path in the model ("model.layers.3.self_attn"), `module` the module there. `dispatcher` is the module
    that calls the attention function (in BERT `attention.self`, elsewhere `module` itself); it carries the head map.
    The projections come first by role: there is one of each role, or (a second position projection, a gate) several, of which the
    first counts; of outputs, one for each stream of tokens, all count. extras: what else the heads own. head_modules: modules of
    single heads. windowed: what the module sees as a batch are the windows of each sample, one sample after another. in_turn: or,
    where True, the first of every sample, then the second of every sample (SegGPT's picture and prompt). proven: False where the
    layout was only guessed from names, so that a cut must be checked by a forward pass. cached: what a cache holds of one token; by
    default the keys and values of each key/value head. gate_width: features that each head computes of a token to gate its output
    with, in the query projection (behind the query) or in one of their own. own_keys: False where keys and values are those of an
    earlier attention (Gemma 3n, Gemma 4): it has no projections for them, and caches nothing.
    """

    name: str
    module: nn.Module
    dispatcher: nn.Module
    head_map: HeadMap
    head_dim: int
    value_dim: int
    hidden_size: int
    kind: Kind
    projections: tuple[ProjectionHeads, ...]
    extras: tuple[HeadTensor, ...] = ()
    windowed: bool = False
    proven: bool = True
    cached: CachedFeatures | None = None
    head_modules: tuple[HeadModules, ...] = ()
    gate_width: int = 0
    own_keys: bool = True
    in_turn: bool = False

    def projection(self, role: Role) -> ProjectionHeads:
        """The first projection of `role`: "query", "key", "value", "output". Raises InvalidInput where the site has none."""
        found = next((projection for projection in self.projections if projection.role == role), None)
        if found is None:
            shared = role in ("key", "value") and not self.own_keys
            why = "its keys and values are those of an earlier attention" if shared else "its adapter must name one of each role"
            raise InvalidInput(f"{self.name} has no {role} projection: {why}.")
        return found

    @property
    def has_layers(self) -> bool:
        """Whether its projections are modules of the model. XLNet's are so only while heads are asked for."""
        inside = set(self.module.modules())
        return all(part.module in inside for part in self.projections)

    @property
    def quantised(self) -> ProjectionHeads | None:
        """Its first projection with quantised weights."""
        return next((part for part in self.projections if is_quantised(part.module)), None)

    @property
    def output(self) -> ProjectionHeads:
        """The output projection."""
        return self.projection("output")

    @property
    def keys_in_window(self) -> int | None:
        """The most keys that one query reads: those of its sliding window. None where it reads all, or nothing says how many."""
        config = getattr(self.dispatcher, "config", None)
        of_all = None if self.kind == "cross" or hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
        window = getattr(self.dispatcher, "sliding_window", of_all)  # Mistral's module reads it from its config
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            return None
        return window if getattr(self.dispatcher, "is_causal", True) else 2 * window - 1

    @property
    def outputs(self) -> tuple[ProjectionHeads, ...]:
        """Its output projection, or (joint attention) that of each stream of tokens; the inputs of all lie alike."""
        return tuple(part for part in self.projections if part.role == "output")

    def by_output(self) -> list[AttentionSite]:
        """The site with each of its output projections alone. The first has its name, others that of their projection."""
        inputs = tuple(part for part in self.projections if part.role != "output")
        first, *others = self.outputs
        alone = [(self.name, first), *((part.name, part) for part in others)]
        return [replace(self, name=name, projections=(*inputs, part)) for name, part in alone]

    @property
    def cache(self) -> CachedFeatures:
        """What a cache holds of one token."""
        return self.cached or CachedFeatures(kv_head=self.head_dim + self.value_dim)

    def columns(self, query_heads: Sequence[int]) -> Tensor:
        """The output projection's input features that stay with these query heads, ascending, int64."""
        return self.output.features_of(query_heads)

    def head_of_column(self) -> Tensor:
        """[input features of the output projection], int64: the query head that each one comes from; of no head: `query_heads`."""
        heads, width = self.output.features.shape
        owner = torch.full((len(self.columns(range(heads))),), heads, device="cpu")
        owner[self.output.features.flatten()] = torch.arange(heads, device="cpu").repeat_interleave(width)
        return owner

    def by_column(self, gates: Tensor) -> Tensor:
        """gates [..., query_heads] -> [..., input features of the output projection]; 1 where one is of no head."""
        of_none = gates.new_ones(*gates.shape[:-1], 1)
        return torch.cat([gates, of_none], dim=-1)[..., self.head_of_column().to(gates.device)]

    def parameters_per_head(self, per_kv_head: bool) -> int:
        """Parameters that go with one query head, or with one key/value head."""
        owned: list[ProjectionHeads | HeadTensor | HeadModules] = [*self.projections, *self.extras, *self.head_modules]
        return sum(part.parameters_per_head() for part in owned if part.per_kv_head == per_kv_head)

    def parameters(self, head_map: HeadMap | None = None) -> int:
        """Parameters that belong to heads, for `head_map` (default: as it is)."""
        head_map = head_map or self.head_map
        return head_map.query_heads * self.parameters_per_head(False) + head_map.kv_heads * self.parameters_per_head(True)


def contiguous_heads(role: Role, name: str, module: nn.Module, heads: int, width: int) -> ProjectionHeads:
    """Heads that lie one after another and fill the projection: head h owns features h * width up to (h + 1) * width."""
    check_projection(name, module)
    projection = ProjectionHeads(role, name, module, features_in_order(heads, width))
    if weight_shape(module)[projection.weight_dim] != heads * width:
        check_filled(projection)
    return projection


@lru_cache(maxsize=64)
def features_in_order(heads: int, width: int) -> Tensor:
    """[heads, width], shared by all that ask: large models have hundreds of equal projections."""
    return torch.arange(heads * width, device="cpu").view(heads, width)


def heads_at(
    role: Role, name: str, module: nn.Module, heads: int, width: int, start: int = 0, step: int | None = None
) -> ProjectionHeads:
    """Heads at equal distances in a fused projection: head h owns `width` features from start + h * step (default: width).

    Complete the check with `check_filled` over all roles of the projection.
    """
    check_projection(name, module)
    # On the CPU in models that are built on another device too.
    starts = start + torch.arange(heads, device="cpu")[:, None] * (width if step is None else step)
    return ProjectionHeads(role, name, module, starts + torch.arange(width, device="cpu"))


def check_filled(*projections: ProjectionHeads) -> None:
    """UnsupportedModel unless the heads of `projections`, all in one module, own each of its features exactly once."""
    first = projections[0]
    have, owned = weight_shape(first.module)[first.weight_dim], torch.cat([part.features.flatten() for part in projections])
    if not torch.equal(owned.sort().values, torch.arange(have, device="cpu")):
        roles = " + ".join(f"{len(part.features)} {part.role} heads x {part.features.shape[1]}" for part in projections)
        raise UnsupportedModel(f"{first.name} has {have} features; expected {roles} = {owned.numel()}.")


def check_projection(name: str, module: Foreign) -> None:
    """UnsupportedModel unless `module` is a plain linear layer whose weight can be sliced by head, or a quantised one of which it
    could be before (`attention_sites` refuses those where they are to be cut)."""
    if is_quantised(module):
        return
    kind = type(module).__name__
    if not (original_class(module) is nn.Linear or kind in PLAIN_LINEAR):
        kind = f"{type(module).__module__}.{kind}" if kind == "Linear" else kind  # of a quantisation library
        raise UnsupportedModel(
            f"{name} is a {kind}; heads can be cut out of torch.nn.Linear and Conv1D only. "
            "Merge adapters and undo quantisation or parametrisation first."
        )
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        found = weight.dtype if type(weight) in (nn.Parameter, Tensor) else type(weight).__name__
        raise UnsupportedModel(
            f"{name} holds {found} weights, quantised or spread over devices; prune first and quantise or shard after."
        )


def at(module: Foreign, path: str) -> Foreign:
    """What stands at `path` below `module`; None where there is nothing."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), module)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
