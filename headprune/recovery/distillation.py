"""Distillation: what of the dense model the pruned one is to reproduce, as a weighted sum of registered terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headprune.arguments import check_arguments, is_number
from headprune.errors import InvalidInput, unknown_name, whole_number
from headprune.models.site import AttentionSite
from headprune.models.tokens import valid_tokens
from headprune.recovery.divergence import (
    common_heads,
    cosine_distance,
    relation_divergence,
    similarity_divergence,
    squared_difference,
)
from headprune.recovery.features import Features
from headprune.recovery.logits import TopLogits, divergence_of, logits_of, refuse_without_classes
from headprune.settings import described

Embed = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Distillation:
    """The weight of each term in the loss; 0 leaves it out.

    logits: temperature^2 KL(teacher || student) of the softened logits (Hinton et al. 2015). Where config.problem_type says that
    several labels may be true, each label's by itself, the mean over labels; of numbers, as a regression gives, the squared
    difference.
    hidden: squared difference of the output of each block that holds an attention.
    attention: squared difference of what each attention adds to the residual stream.
    relations: MiniLMv2 (Wang et al. 2021): KL of softmax(Q Q^T / sqrt(d)), and of keys and values, at `relation_sites`.
    embedding: 1 - cosine of each text's embedding: the new ones stay comparable with the dense model's.
    similarity: KL of the similarities inside a batch: it brings rankings back, and alone leaves the dense model's space.
    task: the loss that the model or loss_fn gives by itself.
    more: weights of terms registered with `distillation_term`.

    relation_sites: names of attentions; default the last self-attention of the student that has heads. relation_heads: into how
    many heads the features are split; default the largest number up to 12 that divides both models'. embed: `embed(output,
    batch)` gives [texts, features]; default the mean of last_hidden_state over valid tokens. relative: squared differences over
    the teacher's mean square, so that one weight fits every layer.
    """

    logits: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    embedding: float = 0.0
    similarity: float = 0.0
    task: float = 0.0
    temperature: float = 2.0
    relative: bool = True
    relation_sites: Sequence[str] | None = None
    relation_heads: int | None = None
    embed: Embed | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(Distillation, vars(self))
        for name, weight in self.weights.items():
            get_term(name)
            if not (is_number(weight) and weight > 0):
                raise InvalidInput(f"the weight of {name} is {weight}; expected more than 0, or 0 to leave it out.")
        if not self.weights and not self.task:
            raise InvalidInput(f"every weight is 0; give one of {', '.join(sorted(_terms))}, or leave the teacher out.")
        if not self.task >= 0:
            raise InvalidInput(f"the weight of task is {self.task}; expected 0 or more.")
        if self.relation_heads is not None:
            whole_number("relation_heads", self.relation_heads)
        if not self.temperature > 0:
            raise InvalidInput(f"temperature is {self.temperature}; expected more than 0.")

    @property
    def weights(self) -> dict[str, float]:
        """Term -> weight, those that are 0 left out, `task` apart."""
        own = {name: getattr(self, name) for name in OWN_TERMS}
        return {name: weight for name, weight in {**own, **self.more}.items() if weight}

    def to_json(self) -> dict[str, Any]:
        """The settings, for comparison with an earlier run's."""
        return {
            "weights": {**self.weights, "task": self.task}, "temperature": self.temperature, "relative": self.relative,
            "relation_sites": None if self.relation_sites is None else list(self.relation_sites),
            "relation_heads": self.relation_heads, "embed": described(self.embed),
        }  # fmt: skip


OWN_TERMS = ("logits", "hidden", "attention", "relations", "embedding", "similarity")


@dataclass(frozen=True)
class Comparison:
    """Both models' Features of one batch, and what a term needs to read them. valid: (site name, states) -> bool [batch, tokens] of
    the tokens that count; valid_logits: the same of logits, whose site is the last. problem: the models' `config.problem_type`."""

    student: Features
    teacher: Features
    sites: tuple[AttentionSite, ...]
    batch: Any
    setting: Distillation
    valid: Callable[[str, Tensor], Tensor]
    valid_logits: Callable[[str, Tensor], Tensor]
    problem: str | None = None


Function = Callable[[Comparison], Tensor]
Wanted = Callable[[Distillation, Sequence[AttentionSite]], Mapping[str, Iterable[str]]]


@dataclass(frozen=True)
class Term:
    """A registered loss. wanted: which Features it reads, and at which sites."""

    name: str
    function: Function
    wanted: Wanted


_terms: dict[str, Term] = {}


def distillation_term(name: str, wanted: Wanted = lambda setting, sites: {}) -> Callable[[Function], Function]:
    """Registers the decorated `term(comparison) -> scalar` under `name`, for Distillation(more={name: weight})."""

    def register(function: Function) -> Function:
        _terms[name] = Term(name, function, wanted)
        return function

    return register


def get_term(name: str) -> Term:
    if name not in _terms:
        raise unknown_name("distillation term", name, _terms)
    return _terms[name]


def wanted_features(setting: Distillation, sites: Sequence[AttentionSite]) -> dict[str, tuple[str, ...]]:
    """Field of Features -> sites, for all terms of `setting`."""
    found: dict[str, dict[str, None]] = {}
    for name in setting.weights:
        for kind, names in get_term(name).wanted(setting, sites).items():
            found.setdefault(kind, {}).update(dict.fromkeys(names))
    return {kind: tuple(names) for kind, names in found.items()}


def distillation_loss(comparison: Comparison) -> Tensor:
    """The weighted sum of the terms of `comparison.setting`, fp32, a scalar; the task's own loss is not in it."""
    total = torch.zeros(())
    for name, weight in comparison.setting.weights.items():
        found = get_term(name).function(comparison)
        total = total.to(found.device) + weight * found
    return total


def every_site(*kinds: str) -> Wanted:
    return lambda setting, sites: {kind: [site.name for site in sites] for kind in kinds}


def relation_sites(setting: Distillation, sites: Sequence[AttentionSite]) -> dict[str, list[str]]:
    names = setting.relation_sites
    if names is None:
        usable = (site for site in sites if site.kind == "self" and site.head_map.query_heads and site.own_keys)
        names = [site.name for site in usable][-1:]
    known = {site.name: site for site in sites}
    for name in names:
        if name not in known:
            raise unknown_name("attention site", name, known)
        if not known[name].head_map.query_heads:
            raise InvalidInput(f"{name} has lost all its heads, so it has no relations; name other relation_sites.")
        if not known[name].own_keys:
            raise InvalidInput(f"{name} reads keys and values of an earlier attention; name that one in relation_sites.")
    return {kind: list(names) for kind in ("query", "key", "value")}


def pairs(comparison: Comparison, kind: str) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(site name, student's, teacher's) of every call. Raises InvalidInput where the teacher has no such attention."""
    student, teacher = getattr(comparison.student, kind), getattr(comparison.teacher, kind)
    for name, found in student.items():
        expected = teacher.get(name, [])
        if len(expected) != len(found):
            raise InvalidInput(f"the teacher runs {name} {len(expected)} times, the student {len(found)} times; expected the same.")
        for mine, theirs in zip(found, expected):
            yield name, mine, theirs


def mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


@distillation_term("logits")
def logits_term(comparison: Comparison) -> Tensor:
    """Mean over the rows (of a language model: the valid tokens) of all calls."""
    temperature, last = comparison.setting.temperature, comparison.sites[-1].name if comparison.sites else ""
    found = []
    for mine, theirs in zip(comparison.student.outputs, comparison.teacher.outputs):
        student = logits_of(mine)
        if isinstance(theirs, TopLogits):
            refuse_without_classes(student, comparison.problem)
            rows = theirs.divergence(student, temperature)
        else:
            rows = divergence_of(student, comparison.problem)(student, logits_of(theirs), temperature)
        found.append(rows[comparison.valid_logits(last, student)] if rows.dim() == 2 else rows.flatten())
    return torch.cat(found).mean()


@distillation_term("hidden", every_site("hidden"))
def hidden_term(comparison: Comparison) -> Tensor:
    return squared_differences(comparison, "hidden")


@distillation_term("attention", every_site("attention"))
def attention_term(comparison: Comparison) -> Tensor:
    return squared_differences(comparison, "attention")


def squared_differences(comparison: Comparison, kind: str) -> Tensor:
    found = []
    for name, mine, theirs in pairs(comparison, kind):
        if mine.shape != theirs.shape:
            raise InvalidInput(
                f"{name}: the student gives {list(mine.shape)}, the teacher {list(theirs.shape)}; hidden states compare between "
                "models of one width. Use logits or relations for another teacher."
            )
        found.append(squared_difference(mine, theirs, comparison.valid(name, mine), comparison.setting.relative))
    return mean(found)


@distillation_term("relations", relation_sites)
def relations_term(comparison: Comparison) -> Tensor:
    """The sum over queries, keys and values, the mean over sites and calls."""
    found = []
    for kind in ("query", "key", "value"):
        own = []
        for name, mine, theirs in pairs(comparison, kind):
            heads = comparison.setting.relation_heads or common_heads(mine.shape[-1], theirs.shape[-1])
            for whose, states in (("student", mine), ("teacher", theirs)):
                if states.shape[-1] % heads:
                    raise InvalidInput(
                        f"{name}: relation_heads={heads} does not divide the {states.shape[-1]} {kind} features of the {whose}."
                    )
            own.append(relation_divergence(mine, theirs, comparison.valid(name, mine), heads))
        found.append(mean(own))
    return torch.stack(found).sum()


@distillation_term("embedding")
def embedding_term(comparison: Comparison) -> Tensor:
    return mean(cosine_distance(mine, theirs) for mine, theirs in embeddings(comparison))


@distillation_term("similarity")
def similarity_term(comparison: Comparison) -> Tensor:
    return mean(similarity_divergence(mine, theirs) for mine, theirs in embeddings(comparison))


def embeddings(comparison: Comparison) -> Iterable[tuple[Tensor, Tensor]]:
    embed = comparison.setting.embed or (lambda output, batch: mean_pooled(output, comparison))
    for mine, theirs in zip(comparison.student.outputs, comparison.teacher.outputs):
        yield embed(mine, comparison.batch), embed(theirs, comparison.batch)


def mean_pooled(output: Any, comparison: Comparison) -> Tensor:
    """[batch, features]: the mean of last_hidden_state over valid tokens."""
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise InvalidInput(f"{type(output).__name__} has no last_hidden_state; give Distillation(embed=...) or use logits.")
    valid = comparison.valid(comparison.sites[-1].name if comparison.sites else "", states)[..., None]
    mean: Tensor = (states * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return mean


def valid_of(token_mask: Callable[[str, Any], Tensor | None], batch: Any) -> Callable[[str, Tensor], Tensor]:
    """(site name, states [batch, tokens, features]) -> bool [batch, tokens]."""
    return lambda site, states: valid_tokens(states, token_mask(site, batch) if site else None)
