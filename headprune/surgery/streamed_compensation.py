"""Compensation of a model on disk: `headprune.surgery.compensate`, with all calibration batches in one layer at a time.

Two streams of states go through the layers side by side, the dense model's and that of the model pruned so far. At a layer that
loses heads its output projection is solved from both; then the batches go on. Each weight is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.files import read_json, whole_file, write_json
from headprune.models.batches import by_name
from headprune.models.feed_forward import feed_forwards
from headprune.models.gating import output_input_hook
from headprune.models.shards import Stored, header_of
from headprune.models.site import AttentionSite, Foreign
from headprune.models.stream import residual_streams
from headprune.models.streamed import StreamedModel
from headprune.models.tokens import TokenMask, token_masks, valid_tokens
from headprune.models.trunk import Entry, enter
from headprune.scoring.batch_identity import checksum
from headprune.scoring.layer_states import LayerStates, take_over
from headprune.scoring.passed_keys import PassedKeys
from headprune.scoring.passes import pass_of
from headprune.surgery.compensate import Reached, Resolved, Target, add_tokens, resolve, shares_of
from headprune.surgery.normal_equations import NormalEquations, get_solver
from headprune.surgery.parts import Part, Weights, columns_of, masked_to, parts_of, weight_and_bias, weights_in_place
from headprune.surgery.walk import Walk

WORK_KIND, LAYER_KIND = "streamed_compensation", "streamed_compensation_layer"


def resolve_streamed(
    streamed: StreamedModel,
    keep: Mapping[str, Sequence[int]],
    batches: Sequence[Any],
    folder: Path,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    token_mask: TokenMask | None = None,
    method: str = "least_squares",
    feed_forward: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Resolved], dict[str, Stored]]:
    """What became of each site, and where the new output weights and biases lie, by their names in memory; before the cut.

    folder: for states between layers and what has been solved; a killed run goes on behind its last whole layer, another run
    that lies there is thrown away. Other arguments and errors as in `headprune.surgery.compensate.resolve_outputs`.
    """
    if not batches:
        raise InvalidInput("the calibration set is empty; compensation needs at least one batch.")
    shards = streamed.shards
    now = {
        "keep": {name: list(heads) for name, heads in keep.items()}, "batches": [checksum(batch) for batch in batches],
        "method": method, "feed_forward": feed_forward, "folder": str(shards.folder.resolve()), "files": shards.sizes(),
    }  # fmt: skip
    take_over(folder, WORK_KIND, now)
    forward = forward or partial(by_name, instead="forward")
    run = StreamedCompensation(streamed, keep, batches, LayerStates(folder), forward, token_mask, method, feed_forward)
    with pass_of(streamed.model), torch.no_grad():
        return run.resolved(folder, progress)


class StreamedCompensation:
    def __init__(
        self, streamed: StreamedModel, keep: Mapping[str, Sequence[int]], batches: Sequence[Any], states: LayerStates,
        forward: Callable[[Any, Any], Any], token_mask: TokenMask | None, method: str, feed_forward: bool,
    ) -> None:  # fmt: skip
        self.streamed, self.trunk, self.keep, self.batches, self.states = streamed, streamed.trunk, keep, batches, states
        self.forward, self.masks, self.solver = forward, token_masks(streamed.model, token_mask), get_solver(method)
        self.feed_forward, self.keys = feed_forward, PassedKeys(self.trunk, states)
        self.entries: list[Entry] = []
        named = [[site for site in inside if site.name in keep] for inside in self.trunk.sites]
        # As in memory: from the first that loses heads on.
        loses = [any(len(keep[site.name]) < site.head_map.query_heads for site in inside) for inside in named]
        self.sites = [inside if any(loses[: layer + 1]) else [] for layer, inside in enumerate(named)]

    def resolved(self, folder: Path, progress: Callable[[int, int], None] | None) -> tuple[list[Resolved], dict[str, Stored]]:
        last = max(layer for layer, sites in enumerate(self.sites) if sites)
        left = [layer for layer in range(last + 1) if not (folder / "solved" / f"{layer:05d}.json").exists()]
        if left:
            self._enter(first=0 in left)
        reports: list[Resolved] = []
        found: dict[str, Stored] = {}
        for layer in range(last + 1):
            document, weights = folder / "solved" / f"{layer:05d}.json", folder / "solved" / f"{layer:05d}.safetensors"
            if layer in left:
                ahead = () if layer == last else (layer + 1,)
                with self.streamed.holding(layer, *ahead):
                    report, solved = self._layer(layer, go_on=layer < last)
                with whole_file(weights) as draft:
                    save_file(solved, draft)
                write_json(document, LAYER_KIND, {"resolved": [asdict(one) for one in report]})
                self.states.drop("dense", layer)
                self.states.drop("pruned", layer)
                self.keys.drop_read(layer, "dense_", "pruned_")
            reports += [Resolved(**one) for one in read_json(document, LAYER_KIND)["resolved"]]
            found |= header_of(weights)[0]
            if progress:
                progress(layer + 1, last + 1)
        return reports, found

    def _enter(self, first: bool) -> None:
        """Every batch up to the first layer; first: whether that layer is still to be run."""
        with self.streamed.holding(None), self.streamed.holding(0):
            for index, batch in enumerate(self.batches):
                entry = enter(self.trunk, partial(self.forward, self.streamed.model, batch))
                if first:
                    self.states.put("dense", 0, index, entry.states)
                self.entries.append(replace(entry, states=entry.states.new_empty(0)))

    def _layer(self, layer: int, go_on: bool) -> tuple[list[Resolved], dict[str, Tensor]]:
        sites, model, run = self.sites[layer], self.streamed.model, lambda: self._run(layer, 0, "dense")
        behind = feed_forwards(model, sites, run) if self.feed_forward and sites else {}
        streams = residual_streams(model, sites, run) if sites else {}
        streams |= {part.name: part.stream for part in behind.values()}
        parts = parts_of(sites, behind)
        dense = {part.name: weight_and_bias(part) for part in parts}
        solved: dict[str, Weights] = dict(dense)
        reports: list[Resolved] = []
        for part in parts:
            train, held_out = self._gather(layer, part, streams.get(part.name), parts, solved)
            report, solved[part.name] = resolve(part, self.keep.get(part.name), dense[part.name], train, held_out, self.solver)
            reports.append(report)
        for index in range(len(self.batches)) if go_on else ():
            self.states.put("dense", layer + 1, index, self._run(layer, index, "dense"))
            if any(self.sites[: layer + 1]):  # before the first layer that loses heads both models are one
                with weights_in_place(parts, solved), self._gates(sites):
                    self.states.put("pruned", layer + 1, index, self._run(layer, index, "pruned"))
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        changed: dict[str, Tensor] = {}
        for part in parts:
            layer_of_part: Foreign = part.output.module
            tensors = (layer_of_part.weight, layer_of_part.bias)
            with weights_in_place([part], solved):
                changed |= {names[id(one)]: one.data.cpu().contiguous() for one in tensors if one is not None}
        return reports, changed

    def _gather(
        self, layer: int, part: Part, stream: nn.Module | None, parts: Sequence[Part], solved: Mapping[str, Weights]
    ) -> tuple[NormalEquations, NormalEquations]:
        """Normal equations of `part`, for training and held out."""
        weight, _ = weight_and_bias(part)
        columns = columns_of(part, self.keep, weight)
        train, held_out = (NormalEquations.empty(len(columns), weight.shape[0]) for _ in range(2))
        others = [site for site in self.sites[layer] if site is not part]
        for index, batch in enumerate(self.batches):
            target = Target.of(self._reached(layer, index, "dense", part, stream), weight)
            with weights_in_place(parts, solved), self._gates(others):
                reached = self._reached(layer, index, "pruned", part, stream)
            shares = shares_of(valid_tokens(reached[0], self.masks(part.name, batch)), index, len(self.batches))
            add_tokens(zip((train, held_out), shares), columns, weight[:, columns.to(weight.device)], target, reached)
        return train, held_out

    def _reached(self, layer: int, index: int, kind: str, part: Part, stream: nn.Module | None) -> Reached:
        return Walk(self.trunk.layers[layer], lambda: self._run(layer, index, kind), "nothing").to(part, stream)

    def _run(self, layer: int, index: int, kind: str) -> Tensor:
        there = kind if self.states.has(kind, layer, index) else "dense"
        states = self.states.get(there, layer, index).to(self.streamed.device)
        theirs = f"{kind}_" if self.keys.has(layer, index, f"{kind}_") else "dense_"
        shared = self.keys.read(layer, index, self.streamed.device, theirs)
        found = self.trunk.run(layer, self.entries[index].calls[layer], states, shared)
        self.keys.keep(layer, index, shared, f"{kind}_")
        return found

    def _gates(self, sites: Sequence[AttentionSite]) -> ExitStack:
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(output_input_hook(site, masked_to(site, self.keep[site.name])))
            return stack.pop_all()
