"""What a recovery gave, and the folder that keeps it: settings, weights, result."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from headprune.errors import HeadpruneError, InvalidInput
from headprune.files import read_json, whole_file, write_json
from headprune.models.quantised import parts_of
from headprune.recovery.budget import of_first_rank
from headprune.scoring.ranks import together, world_size
from headprune.settings import refuse_other_settings, same_setting

log = logging.getLogger("headprune")
WHAT, RESULT, WEIGHTS, BEST = "recovery", "recovery.json", "recovered.safetensors", "best.safetensors"
BEST_PART = "best-{}-of-{}.safetensors"  # of one rank of a sharded model

TENTH = 10
WENT_BACK = "the weights are those of step"  # behind what was not finite


@dataclass(frozen=True)
class Recovery:
    """What `recover` did.

    losses: (step, training loss) along the way. evaluations: (step, quality), higher is better: the metric, or minus the mean
    loss on `eval`. steps: how many were done; seconds: of all tries. best, best_step: the best evaluation, whose weights the
    model has; None without evaluation, where it has the last. stopped_because: in words.
    """

    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    steps: int
    seconds: float
    best: float | None
    best_step: int
    stopped_because: str

    @property
    def diverged(self) -> bool:
        """Whether it ended because the loss or the quality was not finite."""
        return WENT_BACK in self.stopped_because

    @property
    def loss_ends(self) -> tuple[float, float] | tuple[None, None]:
        """Mean training loss of the first and of the last tenth of the steps, as single batches differ; with a teacher it is the
        distance from it. None where no step was done."""
        if not self.losses:
            return None, None
        values = [loss for _, loss in self.losses]
        some = max(1, len(values) // TENTH)
        return fmean(values[:some]), fmean(values[-some:])

    def refuse_diverged(self, lr: float | None) -> None:
        """HeadpruneError where it diverged, for whoever does not go on from the last good state."""
        if self.diverged:
            now = "" if lr is None else f" (now {lr:g})"
            raise HeadpruneError(f"{self.stopped_because}. Lower lr{now}, in another folder.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recovery:
        found: dict[str, Any] = {name: content[name] for name in cls.__dataclass_fields__}
        found |= {name: tuple(map(tuple, value)) for name, value in found.items() if isinstance(value, list)}
        return cls(**found)

    def __str__(self) -> str:
        quality = "" if self.best is None else f", best {self.best:.4g} at step {self.best_step}"
        first, last = self.loss_ends
        loss = "" if first is None else f", training loss {first:.4g} → {last:.4g} (first and last tenth)"
        return f"{self.steps} steps in {self.seconds:.0f} s{loss}{quality}; stopped: {self.stopped_because}"


def taken_up(model: nn.Module, folder: Path | None, settings: Mapping[str, Any]) -> Recovery | None:
    """The result of an earlier recovery that finished in `folder`, its weights loaded; None where there is still work to do.

    Raises InvalidInput where the folder holds a recovery with other settings, or something else.
    """
    if folder is None or not refuse_other_settings(folder, WHAT, settings) or not (folder / RESULT).exists():
        return None
    result = Recovery.from_json(read_json(folder / RESULT, "recovery"))
    load_model(model, folder / WEIGHTS, device="cpu")
    log.info("taking up %s: %s", folder, result)
    return result


def refuse_differing_ranks(settings: Mapping[str, Any], keeps: bool) -> None:
    """InvalidInput, on every rank, unless all were asked for the same, or some would wait for ever. Each may come with weights of
    its own, which become those of rank 0. keeps: whether there is a folder."""
    if world_size() == 1:
        return
    own = {**settings, "output_dir": "given" if keeps else "not given"}
    found: list[Any] = [None] * world_size()
    with together() as group:
        dist.all_gather_object(found, own, group=group)
    for rank, asked in enumerate(found):
        other = sorted(name for name in own if name != "weights" and not same_setting(found[0][name], asked[name]))
        if other:
            raise InvalidInput(
                f"recover: the ranks were asked for different things ({', '.join(other)}: {found[0][other[0]]!r} of rank 0, "
                f"{asked[other[0]]!r} of rank {rank}); give all of them the same: each takes its share of the batches itself."
            )


def keep_result(model: nn.Module, folder: Path | None, result: Recovery) -> None:
    """Leaves the weights and the result in `folder`, and nothing that was only for going on. Each rank waits until they are there:
    asked for the same again, all are to find them."""
    if folder is None:
        return
    try:
        if first_rank():
            write_result(model, folder, result)
    finally:
        of_first_rank(0.0)


def write_result(model: nn.Module, folder: Path, result: Recovery) -> None:
    with whole_file(folder / WEIGHTS) as draft:
        save_model(model, str(draft))
    write_json(folder / RESULT, "recovery", result.to_json())
    for best in (folder / BEST, *folder.glob(BEST_PART.format("*", "*"))):
        best.unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def first_rank() -> bool:
    return world_size() == 1 or dist.get_rank() == 0


SAMPLES = 64  # entries of each tensor that tell one model from another
SUMS, AWAY = 8, 3  # of them; so many norms away from 0, about which they lie, as they are compared by their ratio


def told_apart(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells `model`, or a state_dict, from others: names and shapes, and a few entries of each tensor, summed with signs drawn
    once and for all (their norm would hardly feel a fine-tune). A run that goes on has made its model again, to rounding."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    shapes = [(name, list(tensor.shape)) for name, tensor in state.items()]
    tensors = (part for tensor in state.values() for part in parts_of(tensor))
    entries = torch.cat([torch.empty(0), *(sampled(tensor).double().cpu() for tensor in tensors if tensor.is_floating_point())])
    signs = 2.0 * torch.randint(2, (SUMS, len(entries)), generator=torch.Generator().manual_seed(0)).double() - 1
    sums = signs @ entries.double() + AWAY * entries.norm()
    return {"model": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16], "weights": [float(f"{found:.6g}") for found in sums]}


def sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLES)]
