"""How long each attention of a model takes with every number of heads, as measured on one machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path

from headprune.errors import InvalidInput
from headprune.files import read_json, write_json
from headprune.head_map import HeadMap
from headprune.scoring.site_shape import SiteShape

MAY_LACK = ("lengths", "sites")  # of an older file


@dataclass(frozen=True)
class LatencyTable:
    """Median nanoseconds of one forward pass.

    machine: device and software that it was measured on. batch, length: of the inputs, the latter in tokens of the first attention.
    attention: for each geometry of a site (`key_of`), the time with 0, 1, 2, ... query heads, one more than it has. rest: the whole
    model's time less its attentions'. lengths: site -> its key in `attention`, where it runs other lengths than the first site of
    its geometry (a decoder's beside the encoder's, layers that attend within windows). sites: the model's attentions; (): not told.
    """

    machine: str
    dtype: str
    batch: int
    length: int
    attention: dict[str, tuple[int, ...]]
    rest: int
    lengths: Mapping[str, str] = field(default_factory=dict)
    sites: tuple[str, ...] = ()

    def cost(self, shape: SiteShape, head_map: HeadMap, site: str | None = None) -> int:
        """Nanoseconds of an attention of `shape` that has the heads of `head_map`; site: its name, where lengths differ. Raises
        InvalidInput for another geometry."""
        times = self.attention.get(self.key(shape, site), ())
        if len(times) <= head_map.query_heads:
            raise InvalidInput(
                f"the latency table has no attention of {key_of(shape)} with {head_map.query_heads} heads (it has "
                f"{', '.join(self.attention) or 'none'}); measure this model."
            )
        return times[head_map.query_heads]

    def key(self, shape: SiteShape, site: str | None) -> str:
        """Under which the times of `site` stand in `attention`."""
        own = self.lengths.get(site or "", "")
        return own if own.startswith(key_of(shape)) else key_of(shape)

    def of_pruned(self, original: Mapping[str, SiteShape], now: Mapping[str, SiteShape]) -> LatencyTable:
        """The same times for the model that was measured, of shapes `original`, once it has been pruned to those of `now`."""
        attention, lengths = dict(self.attention), dict(self.lengths)
        for name, shape in now.items():
            measured = self.key(original[name], name)
            if shape != original[name] and measured in self.attention:
                lengths[name] = f"{key_of(shape)}, pruned from {measured}"
                attention[lengths[name]] = self.attention[measured][: shape.head_map.query_heads + 1]
        return replace(self, attention=attention, lengths=lengths)

    def refuse_other_machine(self, machines: Sequence[str]) -> None:
        """InvalidInput unless the table was measured on one of `machines`."""
        if self.machine not in machines:
            raise InvalidInput(
                f"the latency table was measured on {self.machine}, this is {' or '.join(machines)}; measure it here again."
            )

    def refuse_other_model(self, sites: Collection[str]) -> None:
        """InvalidInput where `rest` is not that of a model with these attentions: others of the same geometry may be fewer."""
        if self.sites and set(self.sites) != set(sites):
            only = next(name for name in (*sites, *self.sites) if (name in self.sites) != (name in sites))
            raise InvalidInput(
                f"the latency table is of another model, with {len(self.sites)} attentions; this one has {len(sites)}, and {only} "
                f"is in {'the table' if only in self.sites else 'this model'} alone. Measure this model."
            )

    def save(self, path: str | Path) -> None:
        """Writes latency.json, through a temporary name."""
        content = {**vars(self), "attention": {key: list(times) for key, times in self.attention.items()}}
        write_json(path, "latency_table", content)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Raises InvalidInput where the file is no latency table."""
        document = read_json(path, "latency_table")
        try:
            values = {name: document[name] for name in cls.__dataclass_fields__ if name in document or name not in MAY_LACK}
            attention = {key: tuple(map(index, times)) for key, times in values["attention"].items()}
            lengths = dict(values.get("lengths", {}))
            sites = tuple(map(str, values.get("sites", ())))
            return cls(**{**values, "attention": attention, "rest": index(values["rest"]), "lengths": lengths, "sites": sites})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a complete latency_table file: {error!r}.") from None


def key_of(shape: SiteShape) -> str:
    """The geometry that a measurement is good for."""
    shared = "" if not shape.head_map.kv_stay else ", keys that others read" if shape.own_keys else ", keys of another"
    return f"{shape.head_map}, head_dim {shape.head_dim}, value_dim {shape.value_dim}, hidden {shape.hidden_size}{shared}"
