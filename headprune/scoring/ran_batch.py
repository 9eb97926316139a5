"""What the host must know of a batch that a device has run, asked for at once and read while the next batch runs already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from headprune.scoring.batch_identity import checksum
from headprune.scoring.passes import refuse_infinite


class RanBatch:
    """`batch`, whose kernels are under way, and its loss. Copies to the host are queued behind them, so that nothing waits here."""

    def __init__(self, batch: Any, loss: Tensor | None) -> None:
        self._arrived: list[torch.cuda.Event] = []
        self._batch = tree_map(self._on_the_host, batch)
        self._finite = None if loss is None else self._on_the_host(torch.isfinite(loss).all())

    @property
    def under_way(self) -> bool:
        """Whether some of it is on a device, and the next batch may be started before this one is read."""
        return bool(self._arrived)

    def read(self) -> int:
        """The batch's checksum. Raises InvalidInput where its loss was not finite."""
        for event in self._arrived:
            event.synchronize()
        if self._finite is not None:
            refuse_infinite(bool(self._finite), self._batch)
        return checksum(self._batch)

    def _on_the_host(self, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_cuda):
            return leaf
        with torch.cuda.device(leaf.device):  # pragma: no cover (needs a CUDA device)
            copy = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True).copy_(leaf, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._arrived.append(event)
        return copy
