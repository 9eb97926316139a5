"""Prunes a model on disk: no more of it is in memory than the attentions of one layer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.files import clear_disk_errors, read_json, replace_folder, write_json, write_text
from headprune.models import attention_sites
from headprune.models.shards import INDEX, SINGLE, Shards, open_shards
from headprune.models.streamed import memory_names
from headprune.planning.pruning_plan import PruningPlan
from headprune.surgery.checkpoint import skeleton
from headprune.surgery.companions import copy_companions
from headprune.surgery.cut import cut, cut_site
from headprune.surgery.manifest import write_manifest
from headprune.surgery.prune import PruneReport
from headprune.surgery.remote_code import write_remote_code
from headprune.surgery.savings import Savings
from headprune.surgery.shard_writer import Entry, write_shard

log = logging.getLogger("headprune")
DRAFT, DRAFT_KIND = "draft.json", "folder_being_pruned"


def prune_folder(
    source: str | os.PathLike, plan: PruningPlan, target: str | os.PathLike, *, progress: Callable[[int, int], None] | None = None
) -> PruneReport:
    """Writes the model of `source` without the heads that `plan` lets go to `target`, a folder as `hp.save` writes it.

    Weight files are written one by one; a killed run goes on behind the last whole one. Peak memory: the projections of the
    attentions of one or two layers. progress: called with (files done, files).

    Raises InvalidPlan where the plan is for another model, CorruptCheckpoint naming a weight file that is missing or cut short,
    UnsupportedModel where the weights of an attention lie in the files in another form than in memory. `source` is only read,
    and `target` appears when it is complete.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or target.resolve() == source.resolve()):
        raise InvalidInput(f"{target} is {'the source itself' if target.is_dir() else 'a file'}; give another folder to write to.")
    shards = open_shards(source)
    model = skeleton(source)
    plan.check_fits(model)
    sites = {site.name: site for site in attention_sites(model)}
    kept = {name: heads for name, heads in plan.items() if len(heads) < sites[name].head_map.query_heads}
    for name in kept:
        if sites[name].head_modules:
            raise UnsupportedModel(f"{name} numbers modules by head, and so their files; load the model whole to prune it.")
    savings = Savings.of(model, sites, kept)
    cutting = Cutting(source, shards, kept)
    before = model.state_dict()
    cut(model, kept, verify=False)
    cutting.cuts_to(changed_shapes(before, model.state_dict()))
    draft = target.with_name(f".{target.name}.part")
    with clear_disk_errors(target):
        take_up(draft, shards, plan)
        for done, file in enumerate(shards.files):
            if not (draft / file).exists():
                write_shard(draft / file, cutting.entries(file), shards.metadata[file])
            if progress:
                progress(done + 1, len(shards.files))
        finish(draft, cutting, model)
        replace_folder(draft, target)
    return PruneReport(savings, (), done=True)


def changed_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, tuple[int, ...] | None]:
    """Name in memory -> its new shape, None where it goes; of those that do not stay as they are."""
    added = sorted(set(after) - set(before))
    if added:
        raise UnsupportedModel(f"the cut adds {added[0]}, which no weight file holds; load the model whole to prune it.")
    shapes = {name: tuple(after[name].shape) if name in after else None for name in before}
    return {name: shape for name, shape in shapes.items() if shape != tuple(before[name].shape)}


class Cutting:
    """Cuts one attention at a time, when the first of its tensors is asked for; their memory goes with the last one."""

    def __init__(self, source: Path, shards: Shards, kept: Mapping[str, tuple[int, ...]]) -> None:
        self.shards, self.kept = shards, kept
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.model: PreTrainedModel = skeleton(source)
        self.sites = {site.name: site for site in attention_sites(self.model)}
        self.in_memory = memory_names(self.model, shards)
        self._ready: dict[str, Tensor] = {}

    def entries(self, file: str) -> list[Entry]:
        """What the file of this name is to hold."""
        found = []
        for name, stored in self.shards.items():
            if stored.path.name != file:
                continue
            inside = self.in_memory.get(name)
            if inside not in self.shapes:
                found.append(Entry(name, stored.dtype, stored.shape, stored))
            elif self.shapes[inside] is not None:
                found.append(Entry(name, stored.dtype, self.shapes[inside], partial(self._taken, inside)))
        return found

    def cuts_to(self, shapes: dict[str, tuple[int, ...] | None]) -> None:
        """shapes: as `changed_shapes` gives them. UnsupportedModel where a tensor is in no file under a name of its own."""
        self.shapes = shapes
        lacking = sorted(set(shapes) - set(self.in_memory.values()))
        if lacking:
            raise UnsupportedModel(f"{lacking[0]} is made from other tensors of the files when it is loaded; load the model whole.")

    def _taken(self, name: str) -> Tensor:
        if name not in self._ready:
            site = self._site_of(name)
            changed = {stored: memory for stored, memory in self.in_memory.items() if memory in self.shapes}
            inside = {stored: memory for stored, memory in changed.items() if self._site_of(memory) == site}
            for stored, memory in inside.items():
                set_tensor(self.model, memory, self.shards.read(stored))
            cut_site(self.sites[site], self.kept[site])
            for memory in inside.values():
                if self.shapes[memory] is not None:
                    self._ready[memory] = self.model.get_parameter(memory).detach()
                    set_tensor(self.model, memory, self._ready[memory].to("meta"))
        return self._ready.pop(name)

    def _site_of(self, name: str) -> str:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        for site in self.kept:
            parts = {id(part.module) for part in (*self.sites[site].projections, *self.sites[site].extras)}
            if id(owner) in parts:
                return site
        raise UnsupportedModel(f"{name} changes with a cut but is no attention's own; load the model whole to prune it.")


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))


def take_up(draft: Path, shards: Shards, plan: PruningPlan) -> None:
    """Makes `draft`, or goes on with what a killed run left there for the same files and the same plan."""
    found = {name: (shards.folder / name).stat() for name in shards.files}
    now = {
        "source": str(shards.folder.resolve()), "keep": {name: list(heads) for name, heads in plan.items()},
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()},
    }  # fmt: skip
    path = draft / DRAFT
    if path.exists() and {key: value for key, value in read_json(path, DRAFT_KIND).items() if key in now} == now:
        log.info("taking up %s", draft)
        return
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write_json(path, DRAFT_KIND, now)


def finish(draft: Path, cutting: Cutting, model: PreTrainedModel) -> None:
    """What a folder has beside its weights."""
    shards = cutting.shards
    model.config.save_pretrained(draft)
    write_remote_code(model, draft)
    copy_companions(shards.folder, draft)
    if shards.files != [SINGLE]:
        entries = {entry.name: (file, entry.nbytes) for file in shards.files for entry in cutting.entries(file)}
        total = sum(nbytes for _, nbytes in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in entries.items()}}
        write_text(draft / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    (draft / DRAFT).unlink()
    write_manifest(draft)
