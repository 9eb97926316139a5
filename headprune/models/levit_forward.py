"""An attention of LeViT that makes the picture smaller, without heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headprune.models.emptied import EmptiedAlone


class EmptiedSmaller(EmptiedAlone):
    resolution_out: int

    def places(self, states: Tensor) -> Sequence[int]:
        return states.shape[0], self.resolution_out**2
