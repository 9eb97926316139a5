"""What each head attends to, in words, with the numbers that say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.files import read_json, write_json
from headprune.models.name_cell import NameCell
from headprune.models.streamed import streamed_of
from headprune.scoring.observations import Need, Observations, SiteObservations


@dataclass(frozen=True)
class Rule:
    """The label holds where the sum of these fields' means over sequences reaches the threshold."""

    label: str
    fields: tuple[str, ...]
    threshold: float

    def value(self, evidence: Mapping[str, float]) -> float:
        return sum(evidence.get(field, 0.0) for field in self.fields)


# The share of a head's attention that must go there; after the kinds of heads that Clark et al. 2019 and Voita et al. 2019 find.
RULES = (
    Rule("first token", ("first_mass",), 0.5),
    Rule("previous token", ("previous_mass",), 0.4),
    Rule("itself", ("self_mass",), 0.4),
    Rule("separators and punctuation", ("special_mass", "punctuation_mass"), 0.5),
    Rule("induction", ("probe_induction",), 0.3),
    Rule("local", ("local_mass",), 0.7),
    Rule("broad", ("evenness",), 0.8),
)
NONE = "mixed"
EVIDENCE = (
    "first_mass", "previous_mass", "self_mass", "local_mass", "special_mass", "punctuation_mass", "evenness", "entropy",
    "max_prob", "distance", "probe_induction", "probe_previous", "probe_retrieval",
)  # fmt: skip


@dataclass(frozen=True)
class HeadPortrait:
    """labels: the rules that hold, or "mixed"; evidence: field of SiteObservations -> mean over the sequences observed."""

    labels: tuple[str, ...]
    evidence: dict[str, float]

    def __str__(self) -> str:
        reasons = {rule.label: rule.value(self.evidence) for rule in RULES}
        return ", ".join(f"{label} {reasons[label]:.2f}" if label in reasons else label for label in self.labels)


@dataclass(frozen=True)
class Portraits(Mapping[str, tuple[HeadPortrait, ...]]):
    """Site name -> a portrait of each query head; sites that no data ran through are left out."""

    heads: dict[str, tuple[HeadPortrait, ...]]

    def __getitem__(self, name: str) -> tuple[HeadPortrait, ...]:
        return self.heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [{"labels": list(head.labels), "evidence": head.evidence} for head in heads] for name, heads in self.items()}

    def save(self, path: str | Path) -> None:
        """Writes portraits.json, through a temporary name."""
        write_json(path, "portraits", {"sites": self.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> Portraits:
        """Raises InvalidInput where the file is no portraits.json."""
        document = read_json(path, "portraits")
        try:
            return cls({
                name: tuple(HeadPortrait(tuple(head["labels"]), head["evidence"]) for head in heads)
                for name, heads in document["sites"].items()
            })  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a complete portraits file: {error!r}.") from None

    def __str__(self) -> str:
        return "\n".join(f"{name} head {number}: {head}" for name, heads in self.items() for number, head in enumerate(heads))

    def __rich__(self) -> Table:
        table = Table("attention", "head", "attends to", title="portraits: label and the share behind it", title_justify="left")
        for name, heads in self.items():
            for number, head in enumerate(heads):
                table.add_row("" if number else NameCell(name), str(number), str(head), end_section=number == len(heads) - 1)
        return table


def portrait_needs(model: nn.Module) -> set[Need]:
    """What to observe for portraits of `model`: induction is looked for in decoders that read tokens, unless they are read layer by
    layer."""
    decodes = getattr(model, "can_generate", bool)() and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {Need.ATTENTION, Need.ATTENTION_PATTERN} | ({Need.PROBE} if decodes and streamed_of(model) is None else set())


def portraits(observed: Observations) -> Portraits:
    """A portrait of every head, from what was observed with needs={"attention", "attention_pattern"}.

    Kinds of tokens count where token_kinds were given, induction where "probe" was observed too (decoders).
    Raises InvalidInput where the statistics were not observed.
    """
    check_arguments(portraits, locals())
    found = {}
    for name, site in observed.items():
        if not site.shape.head_map.query_heads:  # nothing is observed there
            continue
        for need in (Need.ATTENTION, Need.ATTENTION_PATTERN):
            if not site.has(need):
                raise InvalidInput(f"portraits need {need.value}, which was not observed at {name}; observe with needs={{{need}}}.")
        if site.reached:
            found[name] = portraits_of(site)
    return Portraits(found)


def portraits_of(site: SiteObservations) -> tuple[HeadPortrait, ...]:
    means = {field: head_means(getattr(site, field)) for field in EVIDENCE if getattr(site, field) is not None}
    heads = []
    for head in range(site.shape.head_map.query_heads):
        evidence = {field: value for field, values in means.items() if (value := float(values[head])) == value}
        labels = tuple(rule.label for rule in RULES if rule.value(evidence) >= rule.threshold)
        heads.append(HeadPortrait(labels or (NONE,), evidence))
    return tuple(heads)


def head_means(values: Tensor) -> Tensor:
    """[query_heads], out of rows per sequence or as it is."""
    return values.mean(dim=0) if values.dim() == 2 else values
