"""A teacher's logits on disk: it runs once, and recovery needs it no more.

One safetensors file per batch, named by the batch's content, so that the order may change and a killed pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.files import read_json, whole_file, write_json
from headprune.models.batches import several
from headprune.recovery.distillation import Distillation
from headprune.recovery.features import Features, catching
from headprune.recovery.logits import TopLogits, logits_of, problem_type, refuse_without_classes
from headprune.recovery.result import told_apart
from headprune.recovery.teacher import run
from headprune.scoring.batch_identity import digest
from headprune.scoring.observer import LossFunction
from headprune.scoring.passes import pass_of
from headprune.settings import refuse_other_settings, write_settings

WHAT, FILE, KIND = "folder of logits", "teacher.json", "stored_logits"


@torch.no_grad()
def store_logits(
    teacher: nn.Module,
    batches: Iterable[Any],
    folder: str | Path,
    *,
    top: int = 64,
    temperature: float = 2.0,
    loss_fn: LossFunction | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the `top` likeliest classes of every position of every batch, for `recover(..., teacher=folder)`.

    The classes below them count as one in the loss, so it is exact where `top` is all of them. A pass that was killed goes
    on: what is there stays. Stored are int32 indices and fp32 log softmax(logits / temperature), 8 bytes a class.

    Raises InvalidInput where `folder` holds logits of another teacher or setting, where the model has no logits or loss_fn does not
    call it.
    """
    check_arguments(store_logits, locals())
    whole_number("top", top)
    if not temperature > 0:
        raise InvalidInput(f"temperature is {temperature}; expected more than 0.")
    batches = several(batches)
    folder = Path(folder)
    setting = {"top": top, "temperature": temperature, **told_apart(teacher)}
    known = refuse_other_settings(folder, WHAT, setting)
    with pass_of(teacher):
        for done, batch in enumerate(batches, 1):
            path = folder / f"{digest(batch)}.safetensors"
            if not path.exists() or not (folder / FILE).exists():
                tensors, classes = likeliest(teacher, batch, top, temperature, loss_fn)
                if not known:
                    write_settings(folder, WHAT, setting)
                    known = True
                with whole_file(path) as draft:
                    save_file(tensors, draft)
                write_json(folder / FILE, KIND, {"top": top, "temperature": temperature, "classes": classes})
            if progress:
                progress(done)
    return folder


def likeliest(
    teacher: nn.Module, batch: Any, top: int, temperature: float, loss_fn: LossFunction | None
) -> tuple[dict[str, Tensor], int]:
    """What is stored of a batch, and the number of classes."""
    with catching(teacher, (), {}) as found:
        run(teacher, batch, loss_fn)
    if not found.outputs:
        raise InvalidInput("loss_fn does not call the model itself, so that there are no logits to store; call model(...) in it.")
    tensors: dict[str, Tensor] = {}
    for call, output in enumerate(found.outputs):
        logits = logits_of(output)
        refuse_without_classes(logits, problem_type(teacher))
        values, indices = F.log_softmax(logits.float() / temperature, dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
        tensors |= {f"{call}/log_probabilities": values.cpu().contiguous(), f"{call}/indices": indices.int().cpu().contiguous()}
    return tensors, logits.shape[-1]


class StoredLogits:
    """A teacher out of a folder of `store_logits`."""

    def __init__(self, folder: str | Path, distil: Distillation) -> None:
        self.folder = Path(folder)
        if not (self.folder / FILE).is_file():
            raise InvalidInput(f"{folder} holds no stored logits; give the dense model, or a folder that store_logits wrote.")
        self.setting = read_json(self.folder / FILE, KIND)
        others = sorted(set(distil.weights) - {"logits"})
        if others:
            raise InvalidInput(f"stored logits cannot teach {', '.join(others)}; give the dense model itself as teacher.")

    def check(self, student: nn.Module) -> None:
        """Nothing is known before the first batch."""

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[None]:
        yield

    def features(self, batch: Any) -> Features:
        path = self.folder / f"{digest(batch)}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):
            raise InvalidInput(
                f"{self.folder} holds no logits of this batch; run store_logits on the batches you train on."
            ) from None
        calls = range(len(found) // 2)
        return Features([self.top(found[f"{call}/indices"], found[f"{call}/log_probabilities"]) for call in calls])

    def top(self, indices: Tensor, log_probabilities: Tensor) -> TopLogits:
        return TopLogits(indices, log_probabilities, self.setting["classes"], self.setting["temperature"])
