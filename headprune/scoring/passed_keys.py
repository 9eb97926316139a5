"""Keys and values that one layer makes and later ones read (Gemma 3n, Gemma 4), while layers run one by one.

Beside the states those of the few layers that give them are kept, from there to their last reader. Backwards each reader adds its
gradient to that of the readers above it, and the layer that gave them is differentiated by the sum too: in the order in which a
backward pass over the whole model adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headprune.models.trunk import Shared, Trunk
from headprune.scoring.layer_states import LayerStates

PARTS = ("keys", "values")


@dataclass(frozen=True)
class PassedKeys:
    """Those of the layers of `trunk`, in `states`, by the layer that gives them. Their gradients lie there by the layer that read
    them, so that a layer that is run again after a crash adds nothing twice."""

    trunk: Trunk
    states: LayerStates

    def read(self, layer: int, batch: int, device: torch.device, stream: str = "") -> Shared:
        """What `layer` is given: nothing where it has keys of its own. stream: of several models' keys, whose."""
        if layer not in self.trunk.readers:
            return {}
        source = self.trunk.readers[layer]
        key, value = (self.states.get(f"{stream}{part}", source.layer, batch).to(device).detach() for part in PARTS)
        return {source.place: (key, value)}

    def keep(self, layer: int, batch: int, shared: Shared, stream: str = "") -> None:
        """For later layers, what `layer` has left in `shared`, where any reads it."""
        place = next((source.place for source in self.trunk.readers.values() if source.layer == layer), None)
        for part, tensor in zip(PARTS, shared[place] if place is not None else ()):
            self.states.put(f"{stream}{part}", layer, batch, tensor)

    def has(self, layer: int, batch: int, stream: str) -> bool:
        """Whether what `layer` is to read is there."""
        return layer in self.trunk.readers and self.states.has(f"{stream}keys", self.trunk.readers[layer].layer, batch)

    def drop_read(self, layer: int, *streams: str) -> None:
        """Forgets what `layer` was the last to read."""
        source = self.trunk.readers.get(layer)
        if source is not None and layer == max(one for one, other in self.trunk.readers.items() if other == source):
            self.drop(source.layer, *streams)

    def drop(self, giver: int, *streams: str) -> None:
        for stream in streams or ("",):
            for part in PARTS:
                self.states.drop(f"{stream}{part}", giver)

    def keep_gradients(self, layer: int, batch: int, shared: Shared) -> None:
        """Those of what `layer` read, added to what the readers above it left."""
        if layer not in self.trunk.readers:
            return
        above = self._next_reader(layer)
        for part, tensor in zip(PARTS, shared[self.trunk.readers[layer].place]):
            before = None if above is None else self._gradient(part, above, batch, tensor.device)
            found = tensor.grad if before is None else before if tensor.grad is None else before + tensor.grad
            if found is not None:
                self.states.put(f"{part}_gradients", layer, batch, found)

    def gradients(self, layer: int, batch: int, shared: Shared) -> Iterator[tuple[Tensor, Tensor]]:
        """(tensor that `layer` has just made, its gradient from all that read it), where it asks for one."""
        reader = self._lowest_reader(layer)
        if reader is None:
            return
        for part, tensor in zip(PARTS, shared[self.trunk.readers[reader].place]):
            gradient = self._gradient(part, reader, batch, tensor.device) if tensor.requires_grad else None
            if gradient is not None:
                yield tensor, gradient

    def drop_gradients(self, layer: int) -> None:
        """Forgets those that are in what `layer`, a reader or the giver itself, has come to."""
        above = self._next_reader(layer) if layer in self.trunk.readers else self._lowest_reader(layer)
        if above is not None:
            for part in PARTS:
                self.states.drop(f"{part}_gradients", above)

    def _gradient(self, part: str, reader: int, batch: int, device: torch.device) -> Tensor | None:
        kind = f"{part}_gradients"
        return self.states.get(kind, reader, batch).to(device) if self.states.has(kind, reader, batch) else None

    def _next_reader(self, layer: int) -> int | None:
        """The next one above `layer` that reads the same."""
        source = self.trunk.readers[layer]
        return min((other for other, its in self.trunk.readers.items() if its == source and other > layer), default=None)

    def _lowest_reader(self, giver: int) -> int | None:
        return min((reader for reader, source in self.trunk.readers.items() if source.layer == giver), default=None)
