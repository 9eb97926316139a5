"""One attention of a model on disk cut at a time, as the tensors of its weight files are written anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock

from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.errors import UnsupportedModel
from headprune.models import attention_sites
from headprune.models.shards import DTYPES, Shards, Stored, read_stored
from headprune.models.streamed import known_names, memory_names, refuse_misfit
from headprune.surgery.checkpoint import skeleton
from headprune.surgery.cut import cut_site
from headprune.surgery.shard_writer import Entry

UNQUANTISED = ("F64", "F32", "F16", "BF16")


def changed_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, tuple[int, ...] | None]:
    """Name in memory -> its new shape, None where it goes; of those that do not stay as they are."""
    added = sorted(set(after) - set(before))
    if added:
        raise UnsupportedModel(f"the cut adds {added[0]}, which no weight file holds; load the model whole to prune it.")
    shapes = {name: tuple(after[name].shape) if name in after else None for name in before}
    return {name: shape for name, shape in shapes.items() if shape != tuple(before[name].shape)}


class Cutting:
    """Cuts one attention at a time, when the first of its tensors is asked for; their memory goes with the last one."""

    def __init__(
        self,
        source: Path,
        shards: Shards,
        kept: Mapping[str, tuple[int, ...]],
        shapes: dict[str, tuple[int, ...] | None],
        base: bool = False,
    ) -> None:
        """shapes: as `changed_shapes` gives them; base: as in `hp.load`. UnsupportedModel where a tensor is in no file under a name
        of its own, is quantised, or is no attention's; CorruptCheckpoint where it is of another shape than the config's."""
        self.shards, self.kept, self.shapes = shards, kept, shapes
        self.solved: dict[str, Stored] = {}  # name in memory -> what takes the place of the model's own weights, before the cut
        self.model: PreTrainedModel = skeleton(source, base)
        self.sites = {site.name: site for site in attention_sites(self.model)}
        self.in_memory = memory_names(self.model, shards)
        self.left_out = set(shards) - set(known_names(self.model, shards)) if base else set()  # the head, where it is stored
        self._ready: dict[str, Tensor] = {}
        self._lock = Lock()
        lacking = sorted(set(shapes) - set(self.in_memory.values()))
        if lacking:
            raise UnsupportedModel(f"{lacking[0]} is made from other tensors of the files when it is loaded; load the model whole.")
        changing = {stored: memory for stored, memory in self.in_memory.items() if memory in shapes}
        quantised = next((stored for stored in changing if shards[stored].dtype not in UNQUANTISED), None)
        if quantised is not None:
            raise UnsupportedModel(
                f"{quantised} is stored as {shards[quantised].dtype}, quantised, and a cut in the files would leave its scales; "
                "prune the model as it was, or load it whole."
            )
        refuse_misfit(self.model, shards, changing)
        owners = {id(part.module): name for name in kept for part in self.sites[name].projections}
        owners |= {id(part.module): name for name in kept for part in self.sites[name].extras}
        self._tensors: dict[str, dict[str, str]] = {}  # site -> names in the files, and in memory, of what changes with its cut
        self._site_of: dict[str, str] = {}  # name in memory -> site
        for stored, memory in self.in_memory.items():
            if memory in shapes:
                site = owners.get(id(self.model.get_submodule(memory.rpartition(".")[0])))
                if site is None:  # refused now, not when hours of compensation are behind
                    raise UnsupportedModel(
                        f"{memory} changes with a cut but is no attention's own; load the model whole to prune it."
                    )
                self._tensors.setdefault(site, {})[stored] = memory
                self._site_of[memory] = site

    def entries(self, file: str) -> list[Entry]:
        """What the file of this name is to hold."""
        found = []
        for name, stored in self.shards.items():
            if stored.path != self.shards.folder / file or name in self.left_out:
                continue
            inside = self.in_memory.get(name, "")  # "": a tensor that the model does not know
            shape = self.shapes.get(inside, stored.shape)
            if shape is None:
                continue
            content: Stored | Callable[[], Tensor] = stored
            if inside in self.shapes:
                content = partial(self._taken, inside)
            elif inside in self.solved:
                content = partial(read_as, self.solved[inside], stored.dtype)
            found.append(Entry(name, stored.dtype, shape, content))
        return found

    def _taken(self, name: str) -> Tensor:
        with self._lock:  # files are written side by side
            if name not in self._ready:
                self._cut(self._site_of[name])
            return self._ready.pop(name)

    def _cut(self, site: str) -> None:
        for stored, memory in self._tensors[site].items():
            own = self.shards.read(stored)
            set_tensor(self.model, memory, read_stored(self.solved[memory]).to(own) if memory in self.solved else own)
        cut_site(self.sites[site], self.kept[site])
        for memory in self._tensors[site].values():
            if self.shapes[memory] is not None:
                self._ready[memory] = self.model.get_parameter(memory).detach()
                set_tensor(self.model, memory, self._ready[memory].to("meta"))


def read_as(stored: Stored, dtype: str) -> Tensor:
    return read_stored(stored).to(DTYPES[dtype])


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
