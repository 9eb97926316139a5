"""The folder of a schedule: settings, history, and the model after the last accepted step, each written whole or not at all.

settings.json    what the schedule was asked; another schedule's folder is refused
history.json     one entry for each step
step-003/        model.safetensors (the weights that are left) and plan.json (of the original's heads)
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from headprune.files import read_json, whole_file, whole_folder, write_json
from headprune.planning import PruningPlan
from headprune.schedules.composition import shapes_of
from headprune.schedules.result import Step
from headprune.settings import refuse_other_settings, write_settings
from headprune.surgery.cut import cut

log = logging.getLogger("headprune")
WHAT, WEIGHTS = "schedule", "model.safetensors"


class Record:
    """The steps of one schedule over `dense`, and the model after the last accepted one.

    folder: where it is kept, so that a killed schedule goes on from there; None keeps it in memory.
    Raises InvalidInput where the folder holds something else.
    """

    def __init__(self, dense: nn.Module, folder: str | Path | None, schedule: str, settings: Mapping[str, Any]) -> None:
        self.dense, self.folder = dense, None if folder is None else Path(folder)
        self.shapes = shapes_of(dense)
        self.steps: list[Step] = []
        self.stopped: str | None = None
        self._state: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        if self.folder is not None:
            self._take_up(self.folder, {"schedule": schedule, **settings})

    @property
    def last(self) -> Step | None:
        """The last accepted step."""
        return next((step for step in reversed(self.steps) if step.accepted), None)

    @property
    def present(self) -> Step:
        """The last accepted step, of a schedule that has measured its dense model: the state that it goes on from."""
        return next(step for step in reversed(self.steps) if step.accepted)

    def accept(self, step: Step, model: nn.Module, plan: PruningPlan) -> None:
        """Keeps `model`, the state after `step`; the one before it goes once the history tells of this one."""
        before = self.last
        if self.folder is None:
            self._state = (step.keep, {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})
        else:
            with whole_folder(self.folder / name_of(step)) as draft:
                stored(model, draft / WEIGHTS)
                plan.save(draft / "plan.json")
        self.steps.append(step)
        self._write()
        if self.folder is not None:
            self.forget_recovery(step.number)
            if before is not None:
                shutil.rmtree(self.folder / name_of(before), ignore_errors=True)

    def reject(self, step: Step, why: str) -> None:
        """Notes a step whose model is not kept, and that the schedule ends with it."""
        self.steps.append(replace(step, accepted=False))
        self.stop(why)

    def stop(self, why: str) -> None:
        self.stopped = why
        log.warning("the schedule ends here: %s", why)
        self._write()

    def note(self, **details: Any) -> None:
        """Adds JSON values to the last step."""
        self.steps[-1] = replace(self.steps[-1], details={**self.steps[-1].details, **details})
        self._write()

    def restore(self) -> nn.Module:
        """A copy of the dense model as it was after the last accepted step."""
        step = self.last
        if self.folder is not None and step is not None:
            return loaded(self.dense, step.keep, self.folder / name_of(step) / WEIGHTS)
        if self._state is not None:
            keep, state = self._state
            model = framed(self.dense, keep)
            model.load_state_dict(state)
            return model
        return copy.deepcopy(self.dense)

    def recovery_folder(self, number: int) -> Path | None:
        """Where the recovery of a step keeps what it needs to go on."""
        return None if self.folder is None else self.folder / f"recovery-{number:03d}"

    def forget_recovery(self, number: int) -> None:
        folder = self.recovery_folder(number)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self) -> None:
        if self.folder is not None:
            steps = [step.to_json() for step in self.steps]
            write_json(self.folder / "history.json", "schedule_history", {"stopped": self.stopped, "steps": steps})

    def _take_up(self, folder: Path, settings: Mapping[str, Any]) -> None:
        if not refuse_other_settings(folder, WHAT, settings):
            write_settings(folder, WHAT, settings)
        if (folder / "history.json").exists():
            document = read_json(folder / "history.json", "schedule_history")
            self.steps, self.stopped = [Step.from_json(step) for step in document["steps"]], document["stopped"]
            log.info("taking up %s: %d steps are done", folder, len(self.steps))


def name_of(step: Step) -> str:
    return f"step-{step.number:03d}"


def stored(model: nn.Module, path: Path) -> None:
    with whole_file(path) as draft:
        save_model(model, str(draft), metadata={"format": "pt"})


def framed(dense: nn.Module, keep: Mapping[str, Iterable[int]]) -> nn.Module:
    """A copy of `dense` with the heads `keep` and the dense model's weights."""
    model = copy.deepcopy(dense)
    cut(model, {name: tuple(heads) for name, heads in keep.items()}, proven=True)
    return model


def loaded(dense: nn.Module, keep: Mapping[str, Iterable[int]], path: Path) -> nn.Module:
    """A copy of `dense` with the heads `keep` and the weights of the file `path`."""
    model = framed(dense, keep)
    load_model(model, str(path))
    return model
