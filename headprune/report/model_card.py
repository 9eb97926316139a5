"""The card (README.md) of a pruned model: what it is made from, what was measured, how it loads; its head is what the Hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from headprune.errors import InvalidInput
from headprune.evaluation.embedder import MODULES
from headprune.files import write_text
from headprune.hub import NAME, known_folder
from headprune.report.run_folder import RunFolder, read_run
from headprune.surgery.modeling_headprune import PREFIX
from headprune.version import __version__

KEPT = ("language", "license", "license_name", "license_link", "pipeline_tag")  # of the card of the model that it is made from
CARD = "README.md"
GENERAL = ("AutoModelForPreTraining", "AutoModelForTextEncoding", "AutoModelForMultimodalLM")  # that others say more exactly


def write_card(folder: Path) -> Path:
    """Writes the card of the run in `folder` beside the model that it ended with."""
    model = next(place for place in (folder / "recovered", folder / "model") if place.is_dir())
    write_text(model / CARD, model_card(read_run(folder), model))
    return model / CARD


def model_card(run: RunFolder, model: Path) -> str:
    """In Markdown, of the folder `model` that the run ended with. The run must have come to a plan."""
    if run.plan is None:
        raise InvalidInput(f"{run.folder} holds no plan.json, so that it has not made a model yet; run its recipe again.")
    source = str(run.recipe.get("model", ""))
    name = NAME.fullmatch(source) if not Path(source).is_dir() else None
    before = sum(shape.head_map.query_heads for shape in run.shapes.values())
    gone = run.plan.removed_heads
    auto, embeds = auto_class(model), (model / MODULES).is_file()
    task = "sentence-similarity" if embeds else pipeline_tag(auto)
    head = ModelCardData(**{
        "base_model": None if name is None else name["repository"],
        "library_name": "sentence-transformers" if embeds else "transformers",
        "tags": ["headprune", "pruned", "attention-head-pruning"],
        **({} if task is None else {"pipeline_tag": task}), **inherited(source),
    })  # fmt: skip
    loads = "SentenceTransformer" if embeds else f"{auto or 'AutoModel'}.from_pretrained"
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# {Path(source).name or 'A model'} with fewer attention heads\n",
        f"`{source}` without {gone} of its {before} query heads ({gone / before:.0%}): {', '.join(steps_of(run))}.",
        f"Made by headprune {__version__}.\n",
        '```python\nimport headprune as hp\n\nmodel = hp.load("FOLDER")\n```',
        f'or, also without headprune, `{loads}("FOLDER", trust_remote_code=True)`.\n',
    ]
    if run.comparison is not None:
        table = [run.comparison.columns(), ("---",) * len(run.comparison.columns()), *run.comparison.rows()]
        parts += [f"## Measured\n{run.comparison.task}, dense and pruned in one run{about(run)}:\n", *map(row_of, table), ""]
        parts += [f"Measured on {run.comparison.dense.machine}.\n"] if run.comparison.dense.machine else []
    parts += ["## Heads\n", row_of(("attention", "query heads", "of", "key/value heads", "of")), row_of(("---",) * 5)]
    for site, shape in run.shapes.items():
        kept = shape.head_map if site not in run.plan else shape.head_map.keep(run.plan[site])
        counts = (kept.query_heads, shape.head_map.query_heads, kept.kv_heads, shape.head_map.kv_heads)
        parts.append(row_of((site, *map(str, counts))))
    return "\n".join(parts) + "\n"


def steps_of(run: RunFolder) -> list[str]:
    """How the model was made, in order; a run writes the whole recipe, so that what is missing in it was not done."""
    recipe = run.recipe
    steps = [f"scored by {run.ranking.criterion}"] if run.ranking is not None else []
    steps.append("cut out of the weights")
    if recipe.get("prune", {}).get("compensate", True):
        steps.append("outputs re-solved on calibration data")
    if trained := recipe.get("recover"):
        how = "distilled from the dense model" if trained.get("distil", True) else "fine-tuned by the task's loss"
        form = trained.get("quantise")
        steps.append(f"{how}, for weights that are rounded to {form} afterwards" if form else how)
    if schedule := recipe.get("schedule"):
        steps.append(f"in the steps of the schedule {schedule['name']}")
    return steps


def auto_class(model: Path) -> str | None:
    """The class of transformers' that loads the folder as what was saved; None where its config.json names none."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) if (model / "config.json").is_file() else {}
    saved = f".{PREFIX}{(config.get('architectures') or [''])[0]}"
    found = [name for name, target in config.get("auto_map", {}).items() if str(target).endswith(saved)]
    return min(found, key=lambda name: (name in GENERAL, name), default=None)


def pipeline_tag(auto: str | None) -> str | None:
    """What a model of this class is for, as transformers' pipelines name it."""
    from transformers.pipelines import SUPPORTED_TASKS  # imports much

    if auto in (None, "AutoModel"):  # states, whatever of
        return None
    tasks: dict[str, Any] = SUPPORTED_TASKS
    return next((task for task, kind in tasks.items() if auto in [one.__name__ for one in kind["pt"]]), None)


def about(run: RunFolder) -> str:
    data = run.comparison.dense.data() if run.comparison is not None else ""
    return f", {data}" if data else ""


def row_of(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def inherited(source: str) -> dict[str, Any]:
    """What the card of the model `source` says that holds for the pruned one too; nothing where there is no card."""
    folder = known_folder(source)
    if folder is None or not (folder / CARD).is_file():
        return {}
    try:
        head = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):  # a card that cannot be read
        return {}
    return {name: head[name] for name in KEPT if name in head}
