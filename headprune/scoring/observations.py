"""What was measured about a model's heads: the plain values that every criterion is a function of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headprune.errors import InvalidInput, unknown_name
from headprune.files import SCHEMA_VERSION, path_of, whole_file
from headprune.scoring.site_shape import SiteShape


class Need(Enum):
    """What can be observed; a criterion names what it reads."""

    WEIGHTS = "weights"
    GATE_GRADIENT = "gate_gradient"
    GRAM = "gram"
    WEIGHT_GRADIENT = "weight_gradient"
    MOVEMENT = "movement"
    ABLATION = "ablation"
    SHAPLEY = "shapley"
    MASK_TRIALS = "mask_trials"
    INTEGRATED_GRADIENT = "integrated_gradient"
    ATTENTION = "attention"
    ATTENTION_PATTERN = "attention_pattern"
    ATTENTION_DISTANCE = "attention_distance"
    OUTPUT_NORM = "output_norm"
    PROBE = "probe"

    @classmethod
    def of(cls, need: Need | str) -> Need:
        """`need`, or the one of this value; InvalidInput where there is none."""
        if isinstance(need, Need):
            return need
        try:
            return cls(need)
        except ValueError:
            raise unknown_name("observation", need, [known.value for known in cls]) from None


def measured(need: Need, merge: Literal["samples", "sum", "same"]) -> Any:
    """A field of SiteObservations that `need` fills. Two sets of data combine by joining the rows of their samples, by
    adding, or not at all: values of the model alone are the same in both."""
    return field(default=None, metadata={"need": need, "merge": merge})


@dataclass(frozen=True)
class SiteObservations:
    """What was measured at one site; None where it was not asked for.

    reached: false where no batch ran through this site; what depends on data is then empty or 0.

    weight_l1, weight_l2: fp32 [4, query_heads]: norms of each head's slice in query, key, value, output projection; a
        shared key/value head's are divided evenly over its group.
    weight_max: fp32 [4, query_heads]: the largest magnitude in each slice; a shared key/value head's is that of its whole group.
    weight_count: fp32 [4, query_heads]: the number of weights behind them, divided likewise.
    weight_gradient_dot, weight_gradient_abs, weight_gradient_square: fp32 [batches, 4, query_heads]: sum w g, sum |w g| and
        sum (w g)^2 over each head's slice, g the gradient of that batch's mean loss; divided likewise.
    weight_gradient_samples: fp32 [batches]: how many samples that mean is over.
    movement: fp32 [4, query_heads]: -sum w g added up over training steps, divided likewise.
    gate_gradient: fp32 [samples, query_heads]: dL_n/dgate of each sample's loss.
    input_gram: fp64 [features, features]: sum over valid tokens of x x^T, x the output projection's input; features of
        head 0 first, then of head 1, ...
    input_sum: fp64 [features]: sum of x.
    tokens: fp64 []: how many valid tokens that is.
    output_gram: fp64 [features, features]: W^T W of the output projection W [hidden, features].
    output_l1: fp64 [features]: sum of |W| over each column of W.
    ablation: fp32 [samples, query_heads]: each sample's loss without the head less that with all heads.
    shapley: fp32 [orders, query_heads]: rise of a batch's mean loss when the head goes, in each random order of removal.
    shapley_samples: fp32 [orders]: how many samples that mean is over.
    trial_masks: fp32 [trials, query_heads]: the heads that were kept (1) in random trials over the whole model.
    trial_changes: fp32 [trials]: a batch's mean loss in each trial less that with all heads; the same at every site.
    trial_samples: fp32 [trials]: how many samples that mean is over.
    integrated_gradient: fp32 [samples, query_heads]: integral over alpha of dL_n/dgate with all gates at alpha.

    One row per sequence, each a mean over its tokens (max_logit: the maximum), fp32 [sequences, query_heads]:
    entropy, max_prob, max_logit, first_mass, distance, output_norm: as in headprune.ops.HeadStats.
    previous_mass, self_mass, local_mass: attention on the token before, on the token itself, on those up to 4 away.
    evenness: entropy of a row over that of equal attention to all keys in sight.
    special_mass, punctuation_mass: attention on such tokens; ordinary_max_prob: the largest probability of a key that is not
        special. None where token_kinds are not known.
    projected_norm: ||O_h W_h^T||, the length of what the head adds to its layer's output.

    distance_sum: fp64 [query_heads, query_heads]: Jensen-Shannon divergence of two heads' attention, summed over rows.
    distance_rows: fp64 []: how many rows that is.

    On generated token sequences, fp32 [query_heads]: probe_induction, probe_previous: mean attention on the token that
        followed the last time, on the token before. probe_retrieval: the share of a needle's tokens that are the one most
        attended to when they are to be copied.
    """

    name: str
    shape: SiteShape
    reached: bool = True
    # Typed as tensors: a criterion reads what its needs name, and those were observed.
    weight_l1: Tensor = measured(Need.WEIGHTS, "same")
    weight_l2: Tensor = measured(Need.WEIGHTS, "same")
    weight_max: Tensor = measured(Need.WEIGHTS, "same")
    weight_count: Tensor = measured(Need.WEIGHTS, "same")
    weight_gradient_dot: Tensor = measured(Need.WEIGHT_GRADIENT, "samples")
    weight_gradient_abs: Tensor = measured(Need.WEIGHT_GRADIENT, "samples")
    weight_gradient_square: Tensor = measured(Need.WEIGHT_GRADIENT, "samples")
    weight_gradient_samples: Tensor | None = measured(Need.WEIGHT_GRADIENT, "samples")
    movement: Tensor = measured(Need.MOVEMENT, "sum")
    gate_gradient: Tensor = measured(Need.GATE_GRADIENT, "samples")
    input_gram: Tensor = measured(Need.GRAM, "sum")
    input_sum: Tensor = measured(Need.GRAM, "sum")
    tokens: Tensor = measured(Need.GRAM, "sum")
    output_gram: Tensor = measured(Need.GRAM, "same")
    output_l1: Tensor = measured(Need.GRAM, "same")
    entropy: Tensor = measured(Need.ATTENTION, "samples")
    max_prob: Tensor = measured(Need.ATTENTION, "samples")
    max_logit: Tensor = measured(Need.ATTENTION, "samples")
    first_mass: Tensor = measured(Need.ATTENTION, "samples")
    distance: Tensor = measured(Need.ATTENTION, "samples")
    output_norm: Tensor = measured(Need.ATTENTION, "samples")
    previous_mass: Tensor = measured(Need.ATTENTION_PATTERN, "samples")
    self_mass: Tensor = measured(Need.ATTENTION_PATTERN, "samples")
    local_mass: Tensor = measured(Need.ATTENTION_PATTERN, "samples")
    evenness: Tensor = measured(Need.ATTENTION_PATTERN, "samples")
    special_mass: Tensor | None = measured(Need.ATTENTION_PATTERN, "samples")
    punctuation_mass: Tensor | None = measured(Need.ATTENTION_PATTERN, "samples")
    ordinary_max_prob: Tensor | None = measured(Need.ATTENTION_PATTERN, "samples")
    projected_norm: Tensor = measured(Need.OUTPUT_NORM, "samples")
    distance_sum: Tensor = measured(Need.ATTENTION_DISTANCE, "sum")
    distance_rows: Tensor = measured(Need.ATTENTION_DISTANCE, "sum")
    probe_induction: Tensor = measured(Need.PROBE, "same")
    probe_previous: Tensor = measured(Need.PROBE, "same")
    probe_retrieval: Tensor = measured(Need.PROBE, "same")
    ablation: Tensor = measured(Need.ABLATION, "samples")
    shapley: Tensor = measured(Need.SHAPLEY, "samples")
    shapley_samples: Tensor = measured(Need.SHAPLEY, "samples")
    trial_masks: Tensor = measured(Need.MASK_TRIALS, "samples")
    trial_changes: Tensor = measured(Need.MASK_TRIALS, "samples")
    trial_samples: Tensor = measured(Need.MASK_TRIALS, "samples")
    integrated_gradient: Tensor = measured(Need.INTEGRATED_GRADIENT, "samples")

    def has(self, need: Need) -> bool:
        """Whether what `need` names was observed here."""
        return any(getattr(self, name) is not None for name in fields_of(need))

    def merged(self, other: SiteObservations) -> SiteObservations:
        """Both sets of samples; statistics of weights are those of one model and must be the same."""
        if (self.name, self.shape) != (other.name, other.shape):
            raise InvalidInput("observations of different models cannot be merged.")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in MERGES}
        merged: dict[str, Any] = {name: combined(MERGES[name], *pair) for name, pair in pairs.items()}
        return replace(self, reached=self.reached or other.reached, **merged)


MERGES = {entry.name: entry.metadata["merge"] for entry in fields(SiteObservations) if "merge" in entry.metadata}


@cache
def fields_of(need: Need) -> tuple[str, ...]:
    """The names of the fields that `need` fills."""
    return tuple(entry.name for entry in fields(SiteObservations) if entry.metadata.get("need") is need)


def combined(merge: str, mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    if mine is None or theirs is None or merge == "same":
        return theirs if mine is None else mine
    if merge == "samples":
        return torch.cat([mine, theirs])
    return mine + theirs


@dataclass(frozen=True)
class Observations(Mapping[str, SiteObservations]):
    """Site name -> SiteObservations, for one model and some data. Merged by `+`: batches and ranks combine exactly.

    seen: a checksum of each batch that was read, in order.
    """

    sites: dict[str, SiteObservations]
    seen: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> SiteObservations:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __add__(self, other: Observations) -> Observations:
        if self.keys() != other.keys():
            raise InvalidInput("observations of different models cannot be merged: their sites differ.")
        return Observations({name: self[name].merged(other[name]) for name in self}, self.seen + other.seen)

    def __str__(self) -> str:
        heads = sum(site.shape.head_map.query_heads for site in self.values())
        needs = [need.value for need in Need if any(site.has(need) for site in self.values())]
        return f"Observations of {heads} heads in {len(self)} sites over {len(self.seen)} batches: {', '.join(needs) or 'nothing'}"

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, through a temporary name."""
        tensors = {
            f"{name}/{field}": getattr(site, field).contiguous()
            for name, site in self.items()
            for field in MERGES
            if getattr(site, field) is not None
        }
        shapes = {name: {"shape": site.shape.to_json(), "reached": site.reached} for name, site in self.items()}
        metadata = {
            "kind": "observations",
            "schema_version": str(SCHEMA_VERSION),
            "sites": json.dumps(shapes),
            "seen": json.dumps(self.seen),
        }
        with whole_file(path) as draft:
            save_file(tensors, draft, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Observations:
        """Raises InvalidInput where the file is missing or holds something else."""
        try:
            with safe_open(path_of(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{path} cannot be read as observations: {error}.") from None
        if metadata.get("kind") != "observations" or int(metadata["schema_version"]) > SCHEMA_VERSION:
            raise InvalidInput(f"{path} holds no observations that this headprune reads.")
        sites = {}
        for name, site in json.loads(metadata["sites"]).items():
            values: dict[str, Any] = {field: tensors.get(f"{name}/{field}") for field in MERGES}
            sites[name] = SiteObservations(name, SiteShape.from_json(site["shape"]), site["reached"], **values)
        return cls(sites, tuple(json.loads(metadata["seen"])))
