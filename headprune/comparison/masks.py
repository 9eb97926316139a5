"""A sparsity pattern that stays as it is while the weights that are left are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import prune

from headprune.models.site import Foreign

WEIGHT = "weight"


@contextmanager
def held(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the weights of these layers are multiplied with their masks in every forward pass
    (torch.nn.utils.prune); afterwards they are plain parameters again, with exact zeros."""
    modules: list[tuple[Foreign, Tensor]] = [(model.get_submodule(name), mask) for name, mask in masks.items()]
    for module, mask in modules:
        prune.custom_from_mask(module, WEIGHT, mask.to(module.weight))
    try:
        yield
    finally:
        for module, _ in modules:
            prune.remove(module, WEIGHT)
