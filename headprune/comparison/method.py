"""What a compared method is, what it is given and what it gives, and the registry of all of them."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headprune.errors import HeadpruneError, unknown_name
from headprune.evaluation.tasks import Task
from headprune.planning import PruningPlan
from headprune.recovery import Distillation

# In the order of the table.
KINDS = ("the dense model", "head pruning", "structured pruning", "sparsity", "distillation", "quantisation")


class Refused(HeadpruneError):
    """A method cannot take this model, or so many parameters from it; the message says why and becomes its row."""


@dataclass(frozen=True)
class Subject:
    """What every method is given. model: the dense one, not to be changed. plan: the heads that head pruning keeps. removed: the
    parameters that it removes by that, as many as every other method is to remove. calibration: batches of `task`, for whatever
    a method measures. feed_forward: as in `hp.prune`."""

    model: nn.Module
    task: Task
    plan: PruningPlan
    removed: int
    calibration: Sequence[Any]
    feed_forward: bool = False

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model).eval()


@dataclass(frozen=True)
class Compressed:
    """What a method made of a copy of the dense model.

    masks: name of a linear layer -> which of its weights stay [as the weight], bool; they stay so while it is fine-tuned.
    stored_bits: bits that a sparse file holds for such a weight, from its mask. compact: the smallest form to store, in words.
    compact_bytes: of the whole model in that form, where no file of it can be written. teaches: what a distilled one learns from
    the dense model; None: the task's loss counts, as for all others. form: that all weights were rounded to, as in
    `hp.recovery.quantise`; then a dense copy is fine-tuned for weights that are rounded so, and rounded at the end.
    """

    model: nn.Module
    note: str = ""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    stored_bits: Callable[[Tensor, int], int] | None = None
    compact: str = ""
    compact_bytes: int | None = None
    teaches: Distillation | None = None
    form: str | None = None


Compress = Callable[[Subject], Compressed]


@dataclass(frozen=True)
class Method:
    """granularity: what goes. library: the distribution that does it. kernels: what it takes to run faster than dense."""

    name: str
    label: str
    kind: str
    granularity: str
    library: str
    kernels: str
    compress: Compress

    @property
    def version(self) -> str:
        """The library with its version, "not installed" where it is not."""
        try:
            return f"{self.library} {importlib.metadata.version(self.library)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.library} (not installed)"


_methods: dict[str, Method] = {}


def comparison_method(
    name: str, *, label: str, kind: str, granularity: str, library: str, kernels: str = ""
) -> Callable[[Compress], Compress]:
    """Registers the decorated `compress(subject) -> Compressed` under `name`; it raises Refused where it cannot. kernels: the
    special ones without which it is as slow as the dense model; none where dense matrix products do."""

    def register(compress: Compress) -> Compress:
        _methods[name] = Method(name, label, kind, granularity, library, kernels, compress)
        return compress

    return register


def comparison_methods() -> dict[str, Method]:
    """Every method by name, in the order of the table."""
    return dict(sorted(_methods.items(), key=lambda item: (KINDS.index(item[1].kind), item[0])))


def chosen_methods(names: Sequence[str] | None) -> list[Method]:
    """The methods of these names; all of them for None. Raises InvalidInput for an unknown name."""
    known = comparison_methods()
    for name in names or ():
        if name not in known:
            raise unknown_name("method", name, known)
    return [method for name, method in known.items() if names is None or name in names]
