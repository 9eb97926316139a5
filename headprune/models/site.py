"""AttentionSite: one attention of a model, and where each of its heads lives in the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap

Role = Literal["query", "key", "value", "output"]


@dataclass(frozen=True)
class ProjectionHeads:
    """The features of one projection that belong to each head.

    `features` [heads, width] numbers output features of `module` (query, key, value) or input features (output):
    query heads for "query" and "output", key/value heads for "key" and "value". A fused projection appears once per role.
    """

    role: Role
    name: str
    module: nn.Module
    features: Tensor

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
        weight = self.module.weight.detach()
        rows = weight if self.weight_dim == 0 else weight.t()
        return rows[self.features.to(weight.device)]

    def parameters_per_head(self) -> int:
        """Number of parameters that go with one head."""
        width = self.features.shape[1]
        return width * (self.module.weight.shape[1 - self.weight_dim] + int(self.bias_per_head))


@dataclass(frozen=True)
class AttentionSite:
    """One attention in a model.

    `name` is its path in the model ("model.layers.3.self_attn"), `module` the module there. `dispatcher` is the module
    that calls the attention function (in BERT `attention.self`, elsewhere `module` itself); it carries the head map.
    """

    name: str
    module: nn.Module
    dispatcher: nn.Module
    head_map: HeadMap
    head_dim: int
    value_dim: int
    hidden_size: int
    kind: Literal["self", "cross"]
    projections: tuple[ProjectionHeads, ...]

    def projection(self, role: Role) -> ProjectionHeads:
        return next(projection for projection in self.projections if projection.role == role)

    @property
    def output(self) -> ProjectionHeads:
        return self.projection("output")

    def columns(self, query_heads: tuple[int, ...]) -> Tensor:
        """The output projection's input features of these query heads, ascending, int64."""
        return self.output.features[list(query_heads)].flatten().sort().values

    def head_of_column(self) -> Tensor:
        """[input features of the output projection], int64: the query head that each one comes from."""
        features = self.output.features
        owner = torch.empty(features.numel(), dtype=torch.long)
        owner[features.flatten()] = torch.arange(features.shape[0]).repeat_interleave(features.shape[1])
        return owner

    def parameters(self, head_map: HeadMap | None = None) -> int:
        """Parameters of the projections that belong to heads, for `head_map` (default: as it is)."""
        head_map = head_map or self.head_map
        heads = {True: head_map.kv_heads, False: head_map.query_heads}
        return sum(projection.parameters_per_head() * heads[projection.per_kv_head] for projection in self.projections)


def contiguous_heads(role: Role, name: str, module: nn.Module, heads: int, width: int) -> ProjectionHeads:
    """Heads that lie one after another: head h owns features h * width up to (h + 1) * width."""
    check_projection(name, module)
    projection = ProjectionHeads(role, name, module, torch.arange(heads * width).view(heads, width))
    have = module.weight.shape[projection.weight_dim]
    if have != heads * width:
        raise UnsupportedModel(f"{name} has {have} {role} features; expected {heads} heads x {width} = {heads * width}.")
    return projection


def check_projection(name: str, module: nn.Module) -> None:
    """UnsupportedModel unless `module` is a plain linear layer whose weight can be sliced by head."""
    if not (type(module) is nn.Linear or is_conv1d(module)):
        raise UnsupportedModel(
            f"{name} is a {type(module).__name__}; heads can be cut out of torch.nn.Linear and Conv1D only. "
            "Merge adapters and undo quantisation or parametrisation first."
        )
    if not module.weight.is_floating_point():
        raise UnsupportedModel(f"{name} holds {module.weight.dtype} weights; prune first and quantise after.")


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
