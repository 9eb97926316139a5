"""What was measured about a model's heads: the plain values that every criterion is a function of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.files import SCHEMA_VERSION, clear_disk_errors
from headprune.head_map import HeadMap
from headprune.models.site import AttentionSite


class Need(Enum):
    """What can be observed; a criterion names what it reads."""

    WEIGHTS = "weights"
    GATE_GRADIENT = "gate_gradient"
    GRAM = "gram"


@dataclass(frozen=True)
class SiteShape:
    """The geometry of one attention site, as plans and budgets need it; all sizes in features or parameters."""

    head_map: HeadMap
    head_dim: int
    value_dim: int
    hidden_size: int
    query_head_parameters: int  # go with each query head
    kv_head_parameters: int  # go with each key/value head

    @classmethod
    def of(cls, site: AttentionSite) -> SiteShape:
        parameters = (site.parameters_per_head(False), site.parameters_per_head(True))
        return cls(site.head_map, site.head_dim, site.value_dim, site.hidden_size, *parameters)

    def parameters(self, head_map: HeadMap) -> int:
        return head_map.query_heads * self.query_head_parameters + head_map.kv_heads * self.kv_head_parameters

    def to_json(self) -> dict:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**content, "head_map": {"kv_of_query": list(self.head_map.kv_of_query), "kv_heads": self.head_map.kv_heads}}

    @classmethod
    def from_json(cls, content: Mapping) -> SiteShape:
        head_map = content["head_map"]
        return cls(**{**content, "head_map": HeadMap(tuple(head_map["kv_of_query"]), head_map["kv_heads"])})


@dataclass(frozen=True)
class SiteObservations:
    """What was measured at one site; None where it was not asked for.

    weight_l1, weight_l2: fp32 [4, query_heads]: norms of each head's slice in query, key, value, output projection; a
        shared key/value head's are divided evenly over its group.
    weight_count: fp32 [4, query_heads]: the number of weights behind them, divided likewise.
    gate_gradient: fp32 [samples, query_heads]: dL_n/dgate of each sample's loss.
    input_gram: fp64 [features, features]: sum over valid tokens of x x^T, x the output projection's input; features of
        head 0 first, then of head 1, ...
    input_sum: fp64 [features]: sum of x; None where the projection has no bias that could take up a mean.
    tokens: fp64 []: how many valid tokens that is.
    output_gram: fp64 [features, features]: W^T W of the output projection W [hidden, features].
    """

    name: str
    shape: SiteShape
    weight_l1: Tensor | None = None
    weight_l2: Tensor | None = None
    weight_count: Tensor | None = None
    gate_gradient: Tensor | None = None
    input_gram: Tensor | None = None
    input_sum: Tensor | None = None
    tokens: Tensor | None = None
    output_gram: Tensor | None = None

    def merged(self, other: SiteObservations) -> SiteObservations:
        """Both sets of samples; statistics of weights are those of one model and must be the same."""
        if (self.name, self.shape) != (other.name, other.shape):
            raise InvalidInput("observations of different models cannot be merged.")
        merged = {}
        for field in TENSOR_FIELDS:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine is not None and theirs is not None and field in PER_SAMPLE_FIELDS:
                merged[field] = torch.cat([mine, theirs])
            elif mine is not None and theirs is not None and field in SUMMED_FIELDS:
                merged[field] = mine + theirs
            else:
                merged[field] = theirs if mine is None else mine
        return replace(self, **merged)


TENSOR_FIELDS = tuple(field.name for field in fields(SiteObservations) if field.name not in ("name", "shape"))
PER_SAMPLE_FIELDS = ("gate_gradient",)
SUMMED_FIELDS = ("input_gram", "input_sum", "tokens")


@dataclass(frozen=True)
class Observations(Mapping[str, SiteObservations]):
    """Site name -> SiteObservations, for one model and some data. Merged by `+`: batches and ranks combine exactly."""

    sites: dict[str, SiteObservations]

    def __getitem__(self, name: str) -> SiteObservations:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __add__(self, other: Observations) -> Observations:
        if list(self) != list(other):
            raise InvalidInput("observations of different models cannot be merged: their sites differ.")
        return Observations({name: self[name].merged(other[name]) for name in self})

    def __str__(self) -> str:
        samples = {0 if site.gate_gradient is None else len(site.gate_gradient) for site in self.values()}
        heads = sum(site.shape.head_map.query_heads for site in self.values())
        return f"Observations of {heads} heads in {len(self)} sites over {max(samples, default=0)} samples"

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, through a temporary name."""
        path = Path(path)
        tensors = {
            f"{name}/{field}": getattr(site, field).contiguous()
            for name, site in self.items()
            for field in TENSOR_FIELDS
            if getattr(site, field) is not None
        }
        shapes = json.dumps({name: site.shape.to_json() for name, site in self.items()})
        metadata = {"kind": "observations", "schema_version": str(SCHEMA_VERSION), "sites": shapes}
        draft = path.with_name(f".{path.name}.part")
        with clear_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, draft, metadata)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Observations:
        """Raises InvalidInput where the file is missing or holds something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{path} cannot be read as observations: {error}.") from None
        if metadata.get("kind") != "observations" or int(metadata["schema_version"]) > SCHEMA_VERSION:
            raise InvalidInput(f"{path} holds no observations that this headprune reads.")
        return cls(
            {
                name: SiteObservations(
                    name, SiteShape.from_json(shape), **{field: tensors.get(f"{name}/{field}") for field in TENSOR_FIELDS}
                )
                for name, shape in json.loads(metadata["sites"]).items()
            }
        )
