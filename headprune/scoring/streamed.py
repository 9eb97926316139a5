"""Observations of a model that does not fit into memory: all batches go through one layer before the next one is read.

Forward: the states in front of every layer are kept, observers of the forward pass see each layer as it runs. Then the model's
own head and loss, on the states behind the last layer. Backward: layer by layer from the last, each run again from the states in
front of it, and its gradient handed on. So the weights are read once in each direction, and what is measured is what a pass over
the whole model measures: the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.models.batches import several
from headprune.models.streamed import reader_of
from headprune.models.trunk import Entry, enter, leaving
from headprune.scoring.batch_identity import checksum
from headprune.scoring.layer_states import LayerStates, claim
from headprune.scoring.observations import Need, Observations
from headprune.scoring.observer import Observer, Setting, observer_of
from headprune.scoring.passed_keys import PassedKeys
from headprune.scoring.passes import differentiate, pass_of, refuse_infinite, same_keys, snapshot

BY_LAYER = {
    Need.WEIGHTS, Need.GRAM, Need.OUTPUT_NORM, Need.ATTENTION, Need.ATTENTION_PATTERN, Need.ATTENTION_DISTANCE,
    Need.GATE_GRADIENT, Need.WEIGHT_GRADIENT,
}  # fmt: skip
WORK_KIND = "streamed_observation"


def observe_streamed(
    setting: Setting,
    batches: Iterable[Any],
    wanted: Sequence[Need],
    checkpoint: str | Path | None,
    progress: Callable[[int], None] | None,
) -> Observations:
    """What `observe` gives, for a model that `open_streamed` gave. checkpoint: a folder for states and results.

    Raises InvalidInput for needs that take the whole model at once (switching heads off, probes), and what `observe` raises.
    """
    refused = [need.value for need in wanted if need not in BY_LAYER]
    if refused:
        raise InvalidInput(
            f"{', '.join(refused)} cannot be observed layer by layer; choose criteria of weights, gradients, activations or "
            "attention, or load the model whole."
        )
    reads_data = any(observer_of(need).runs != "nothing" for need in wanted)
    batches, keys = list(several(batches)) if reads_data else [], None
    if reads_data and not batches:
        raise InvalidInput("the calibration set is empty; a criterion that runs the model needs at least one batch.")
    for index, batch in enumerate(batches):
        keys = same_keys(keys, batch, index)
    work = StreamedPass(setting, batches, wanted, None if checkpoint is None else Path(checkpoint), progress)
    with pass_of(setting.model):
        found = work.measured()
    # In the order in which a pass over the whole model leaves them.
    in_order = {site.name: found[site.name] for site in setting.sites}
    return Observations(in_order | snapshot(replace(setting, sites=()), (), ()).sites, work.seen if reads_data else ())


class StreamedPass:
    """One run over all layers, forward and, where something needs gradients, backward."""

    def __init__(
        self,
        setting: Setting,
        batches: list[Any],
        wanted: Sequence[Need],
        folder: Path | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.setting, self.batches, self.folder, self.progress = setting, batches, folder, progress
        self.streamed = reader_of(setting.model)
        self.trunk, self.device = self.streamed.trunk, self.streamed.device
        self.seen = tuple(checksum(batch) for batch in batches)
        self.forward_needs = [need for need in wanted if observer_of(need).runs != "backward"]
        self.backward_needs = [need for need in wanted if observer_of(need).runs == "backward"]
        self.runs_forward = bool(self.backward_needs) or any(observer_of(need).runs == "forward" for need in wanted)
        self.states = LayerStates(folder)
        self.keys = PassedKeys(self.trunk, self.states)
        self.entries: list[Entry] = []
        self.furthest = 0  # the last layer that the states of all batches have come to
        self.done = 0
        with_heads = {site.name for site in setting.sites}
        self.sites = [tuple(site for site in inside if site.name in with_heads) for inside in self.trunk.sites]
        if folder is not None:
            self._take_up(wanted, folder)

    def measured(self) -> dict[str, Any]:
        """Site name -> SiteObservations."""
        # All of it under what any observer wants of the whole pass: a mask that is made for one kind of attention fits no other.
        with watching_pass(self._observers((), (*self.forward_needs, *self.backward_needs))):
            return self._measured()

    def _measured(self) -> dict[str, Any]:
        if self.runs_forward:
            layers = range(len(self.trunk.layers) + 1)
            self.furthest = max((layer for layer in layers if self._there(layer)), default=0)
            self._enter()
        forward = [self._forward(layer) for layer in range(len(self.trunk.layers))]
        if not self.backward_needs:
            return together(forward)
        losses = self._leave()
        lowest = min(layer for layer, sites in enumerate(self.sites) if sites)
        backward = [self._backward(layer, losses, lowest) for layer in range(len(self.trunk.layers) - 1, lowest - 1, -1)]
        backward += [self._snapshot(layer, ()) for layer in range(lowest)]
        return both(together(forward), together(backward)) if self.forward_needs else together(backward)

    def _enter(self) -> None:
        """Every batch up to the first layer."""
        with self.streamed.holding(None), self.streamed.holding(0), torch.no_grad():
            for index, batch in enumerate(self.batches):
                entry = enter(self.trunk, partial(self.setting.run, batch))
                if not self.furthest and not self.states.has("states", 0, index):
                    self.states.put("states", 0, index, entry.states)
                self.entries.append(replace(entry, states=entry.states.new_empty(0)))

    def _forward(self, layer: int) -> Observations:
        """All batches through `layer`, seen by the observers of the forward pass."""
        sites, last = self.sites[layer], layer == len(self.trunk.layers) - 1
        saved = self._saved("forward", layer)
        if saved is not None and (layer < self.furthest or not self.runs_forward):
            return self._passed(saved)
        with self.streamed.holding(layer, *(() if last else (layer + 1,))):
            observers = self._observers(sites, self.forward_needs)
            with torch.no_grad(), watching_pass(observers):
                for index, batch in enumerate(self.batches if self.runs_forward else ()):
                    with watching_batch(observers, batch), watching_forward(observers, batch):
                        self.states.put("states", layer + 1, index, self._run(layer, index))
                    for observer in observers:
                        observer.after_batch(batch, None)
            found = self._save("forward", layer, self._snapshot(layer, observers))
        if not self.backward_needs:
            self.states.drop("states", layer)
            self.keys.drop_read(layer)
        return self._passed(found)

    def _leave(self) -> list[Tensor]:
        """Loss of every batch; the gradients behind the last layer are kept."""
        last, losses = len(self.trunk.layers), []
        with self.streamed.holding(None, last - 1), torch.enable_grad():
            for index, batch in enumerate(self.batches):
                states = self.states.get("states", last, index).to(self.device).requires_grad_()
                with leaving(self.trunk, states, self.entries[index].alone):
                    loss = self.setting.loss(batch)
                differentiate(loss)
                refuse_infinite(bool(torch.isfinite(loss).all()), batch)
                losses.append(loss.detach())
                if not self.states.has("gradients", last, index):
                    self.states.put("gradients", last, index, gradient_of(states))
        return losses

    def _backward(self, layer: int, losses: list[Tensor], lowest: int) -> Observations:
        """The gradients of all batches back through `layer`, seen by the observers of the backward pass."""
        saved = self._saved("backward", layer)
        if saved is not None:
            return self._passed(saved)
        with self.streamed.holding(layer, *(() if layer == lowest else (layer - 1,))), torch.enable_grad():
            observers = self._observers(self.sites[layer], self.backward_needs)
            with watching_pass(observers):
                for index, batch in enumerate(self.batches):
                    states = self.states.get("states", layer, index).to(self.device).requires_grad_(layer > lowest)
                    with watching_batch(observers, batch):
                        self._differentiate(layer, index, states, observers)
                    for observer in observers:
                        observer.after_batch(batch, losses[index])
                    if layer > lowest:
                        self.states.put("gradients", layer, index, gradient_of(states))
            found = self._save("backward", layer, self._snapshot(layer, observers))
        self.states.drop("gradients", layer + 1)
        self.keys.drop_gradients(layer)
        self.keys.drop(layer)
        return self._passed(found)

    def _differentiate(self, layer: int, index: int, states: Tensor, observers: Sequence[Observer]) -> None:
        """Batch `index` through `layer` again and its gradients back, to `states` and to the keys of other layers."""
        gradient, shared = self.states.get("gradients", layer + 1, index).to(self.device), self.keys.read(layer, index, self.device)
        for tensor in (tensor for pair in shared.values() for tensor in pair):
            tensor.requires_grad_()
        with watching_forward(observers, self.batches[index]):
            out = self.trunk.run(layer, self.entries[index].calls[layer], states, shared)
        roots = [(out, gradient), *self.keys.gradients(layer, index, shared)]
        torch.autograd.backward([root for root, _ in roots], [its for _, its in roots])
        self.keys.keep_gradients(layer, index, shared)

    def _there(self, layer: int) -> bool:
        """Whether the states in front of `layer` are kept for all batches."""
        return all(self.states.has("states", layer, index) for index in range(len(self.batches)))

    def _run(self, layer: int, index: int) -> Tensor:
        states, shared = self.states.get("states", layer, index).to(self.device), self.keys.read(layer, index, self.device)
        found = self.trunk.run(layer, self.entries[index].calls[layer], states, shared)
        self.keys.keep(layer, index, shared)
        return found

    def _observers(self, sites: Sequence[Any], needs: Sequence[Need]) -> list[Observer]:
        setting = replace(self.setting, sites=tuple(sites), headless=())
        return [observer_of(need)(setting) for need in needs]

    def _snapshot(self, layer: int, observers: Sequence[Observer]) -> Observations:
        return snapshot(replace(self.setting, sites=self.sites[layer], headless=()), observers, ())

    def _passed(self, found: Observations) -> Observations:
        self.done += 1
        if self.progress:
            directions = 1 + bool(self.backward_needs)
            self.progress(self.done * len(self.batches) // (directions * len(self.trunk.layers)))
        return found

    def _take_up(self, wanted: Sequence[Need], folder: Path) -> None:
        """InvalidInput where the folder holds another pass than this one."""
        shards = self.streamed.shards
        now = {
            "needs": [need.value for need in wanted], "batches": list(self.seen), "folder": str(shards.folder.resolve()),
            "files": shards.sizes(), "dtype": str(self.setting.model.dtype),
        }  # fmt: skip
        other = claim(folder, WORK_KIND, now)
        if other is not None:
            raise InvalidInput(f"{folder} holds a pass with other {other}; remove it or give another checkpoint folder.")

    def _saved(self, direction: str, layer: int) -> Observations | None:
        path = self._results(direction, layer)
        return Observations.load(path) if path is not None and path.exists() else None

    def _save(self, direction: str, layer: int, found: Observations) -> Observations:
        path = self._results(direction, layer)
        if path is not None:
            found.save(path)
        return found

    def _results(self, direction: str, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / direction / f"{layer:05d}.safetensors"


def gradient_of(states: Tensor) -> Tensor:
    return torch.zeros_like(states) if states.grad is None else states.grad


def together(parts: Iterable[Observations]) -> dict[str, Any]:
    return {name: site for part in parts for name, site in part.items()}


def both(forward: dict[str, Any], backward: dict[str, Any]) -> dict[str, Any]:
    """Sites as both directions found them; reached where both reached them."""
    return {
        name: replace(site.merged(backward[name]), reached=site.reached and backward[name].reached)
        for name, site in forward.items()
    }


def watching_pass(observers: Sequence[Observer]) -> ExitStack:
    return entered(observer.watching_pass() for observer in observers)


def watching_batch(observers: Sequence[Observer], batch: Any) -> ExitStack:
    return entered(observer.watching_batch(batch) for observer in observers)


def watching_forward(observers: Sequence[Observer], batch: Any) -> ExitStack:
    return entered(observer.watching_forward(batch) for observer in observers)


def entered(contexts: Iterable[Any]) -> ExitStack:
    with ExitStack() as failing:
        for context in contexts:
            failing.enter_context(context)
        return failing.pop_all()
