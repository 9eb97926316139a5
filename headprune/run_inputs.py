"""What a run reads beside its recipe: weights, data, a plan by hand, which may change under the names that the recipe gives."""

from __future__ import annotations

import hashlib
from pathlib import Path

from headprune.errors import HeadpruneError, InvalidInput
from headprune.evaluation.tasks import Task
from headprune.files import read_json
from headprune.hub import known_folder
from headprune.models.shards import Stored, open_shards
from headprune.recipe import Recipe
from headprune.scoring.batch_identity import checksum

FILE, KIND = "inputs.json", "run_inputs"
LOOKED_AT = 4096  # bytes, at the start, in the middle and at the end of each tensor


def run_inputs(recipe: Recipe, task: Task) -> dict[str, str | None]:
    """What tells them from others of the same names; None for weights that lie in no folder."""
    data = {name: value for name, value in vars(task).items() if name != "tokenizer"}
    data["training"] = file_digest(recipe.task.options.get("training"))  # which a task may read when it is asked for it
    return {"model": weights_digest(recipe.model), "data": f"{checksum(data):08x}", "plan": file_digest(recipe.plan.file)}


def refuse_changed(recipe: Recipe, inputs: dict[str, str | None]) -> None:
    """InvalidInput where the run's folder was begun with another model or other data; a run of an earlier version does not say."""
    written = Path(recipe.output) / FILE
    if not written.exists():
        return
    before = read_json(written, KIND)
    if not (Path(recipe.output) / "plan.json").exists():
        before["plan"] = inputs["plan"]  # of which nothing was made yet
    for name, what in (
        ("model", f"the weights in {recipe.model} have"),
        ("data", f"the data of task {recipe.task.name} has"),
        ("plan", f"{recipe.plan.file} has"),
    ):
        if before.get(name) != inputs[name]:
            raise InvalidInput(
                f"{what} changed since the run in {recipe.output} began, and what it has made would not fit; give another output "
                "(output=...), or remove that folder."
            )


def file_digest(name: str | None) -> str | None:
    path = None if name is None else Path(name).expanduser()
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def weights_digest(model: str) -> str | None:
    """Of names, shapes and some bytes of all tensors in the folder `model`, without reading all of them."""
    try:
        shards = {} if (folder := known_folder(model)) is None else open_shards(folder)
    except HeadpruneError:  # weights of another form
        shards = {}
    found = hashlib.sha256()
    for name, stored in sorted(shards.items()):
        found.update(repr((name, stored.dtype, stored.shape)).encode())
        for part in looked_at(stored):
            found.update(part)
    return found.hexdigest()[:32] if shards else None


def looked_at(stored: Stored) -> list[bytes]:
    with stored.path.open("rb") as file:
        found = []
        for offset in (0, stored.nbytes // 2, max(0, stored.nbytes - LOOKED_AT)):
            file.seek(stored.start + offset)
            found.append(file.read(min(LOOKED_AT, stored.nbytes - offset)))
        return found
