"""What recovery trains on: batches that someone has made, or a dataset of rows with a collator."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from headprune.errors import InvalidInput
from headprune.models.batches import length_of, several, unlabelled
from headprune.models.tokens import IGNORED_LABEL


class Batches(Dataset[Any]):
    """A list whose items are whole batches, each one item of a loader of batch size 1."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(several(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def as_dataset(data: Any, name: str) -> Any:
    """`data` where it is a dataset of rows (torch's or datasets'), else its batches. Raises InvalidInput where it is empty."""
    found = data if is_rows(data) else Batches(data)
    if length_of(found) == 0 or (not has_items(found) and next(iter(found), None) is None):
        raise InvalidInput(f"{name} is empty; give at least one batch.")
    return found


def refuse_batching(name: str, data: Any, options: Mapping[str, Any]) -> None:
    """InvalidInput where training arguments ask for batches of what is batches already, of which all but one would be left out."""
    option = f"per_device_{name}_batch_size"
    if isinstance(data, Batches) and options.get(option, 1) != 1:
        raise InvalidInput(
            f"{option} is {options[option]!r}, and {name} holds batches already; make larger ones, or accumulate several in a step "
            f"(gradient_accumulation_steps={options[option]!r}), or give a dataset of rows."
        )


def refuse_unlabelled(name: str, data: Any, each: bool) -> None:
    """InvalidInput where batches have labels of which a loss counts none; each: also where some have, which are to be averaged."""
    batches = data.batches if isinstance(data, Batches) else []
    without = [number for number, batch in enumerate(batches) if unlabelled(batch)]
    if without and len(without) == len(batches):
        raise InvalidInput(f"no batch of {name} has a label that counts, all are {IGNORED_LABEL}; give labels, or a teacher alone.")
    if without and each:
        raise InvalidInput(
            f"batch {without[0]} of {name}, counted from 0, has no label that counts, all are {IGNORED_LABEL}, and the mean loss "
            f"of {name} would be NaN; leave it out, or give it some."
        )


def steps_per_pass(data: Any, options: Mapping[str, Any]) -> int | None:
    """How many steps see all of `data` once, under these training arguments; None where it does not tell how much there is."""
    length = length_of(data)
    if length is None:
        return None
    rows: int = options.get("per_device_train_batch_size", 1) * int(os.environ.get("WORLD_SIZE", "1"))
    batches, together = math.ceil(length / rows), int(options.get("gradient_accumulation_steps", 1))
    return math.ceil(batches / together)


def is_rows(data: Any) -> bool:
    return (isinstance(data, Dataset) and not isinstance(data, DataLoader)) or hasattr(data, "column_names")


def has_items(dataset: Any) -> bool:
    """Whether its items have numbers: not those of a stream."""
    return hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def on_the_host(dataset: Any) -> bool:
    """Whether the tensors of its first item lie on the CPU, as a loader that pins their memory takes for granted."""
    first = dataset[0] if has_items(dataset) else None
    return all(leaf.device.type == "cpu" for leaf in tree_leaves(first) if isinstance(leaf, Tensor))


class Wrapped(dict[str, Any]):
    """A batch that is no mapping, in one: transformers' Trainer looks for names in every batch, which a tensor takes for values."""


def only_item(items: list[Any]) -> Any:
    return items[0] if isinstance(items[0], Mapping) else Wrapped(batch=items[0])


def opened(batch: Any) -> Any:
    """The batch as it was given."""
    return batch["batch"] if isinstance(batch, Wrapped) else batch


def collator_of(dataset: Any, collator: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """What makes a batch out of a loader's items; None leaves it to transformers."""
    return only_item if isinstance(dataset, Batches) else collator


def first_batch(dataset: Any, collator: Callable[..., Any] | None) -> Any:
    if isinstance(dataset, Batches):
        return dataset[0]
    from transformers import default_data_collator

    rows = [dataset[0]] if has_items(dataset) else [next(iter(dataset))]
    return (collator or default_data_collator)(rows)
