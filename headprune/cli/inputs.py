"""What several commands take: a model, its task, a budget, a place for the output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprune.cli import completion
from headprune.cli.terminal import with_bar
from headprune.files import refuse_unwritable

if TYPE_CHECKING:  # commands import what they need when they run
    from transformers import PreTrainedModel

    from headprune.evaluation.tasks import Task


def writable(context: typer.Context, path: Path | None) -> Path | None:
    """`path`, which was given to write to: whether that can be is asked before the work, not after it."""
    if path is not None and not context.resilient_parsing:
        refuse_unwritable(path)
    return path


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A model folder, or an embedded model: minilm, stdlib-lm.", autocompletion=completion.one_of(completion.models)
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="The data: docstring-retrieval (default for encoders), standard-library-text (for language models).",
        autocompletion=completion.one_of(completion.tasks),
    ),
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="global, uniform or optimal.",
        show_default="global",
        autocompletion=completion.one_of(completion.allocations),
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of tables.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write.", callback=writable)]
StreamedOption = Annotated[
    bool, typer.Option("--streamed", help="Read the weights layer by layer, for models that do not fit into memory.")
]

# A budget: one of these.
HeadsOption = Annotated[float | None, typer.Option("--heads", help="Fraction of the query heads to remove.")]
ParamsOption = Annotated[float | None, typer.Option("--params", help="Fraction of the attention parameters to remove.")]
KvCacheOption = Annotated[float | None, typer.Option("--kv-cache", help="Fraction of the key/value cache to remove.")]
FlopsOption = Annotated[float | None, typer.Option("--flops", help="Fraction of the attention FLOPs to remove.")]


def opened(model: str, task: str | None, streamed: bool = False) -> tuple[PreTrainedModel, Task]:
    """(model, task), the task by its name or the one for such models."""
    from headprune.evaluation.tasks import build_task, check_task
    from headprune.sources import default_task

    if task is not None:
        check_task(task)
    found, tokenizer = opened_model(model, streamed)
    name = task or default_task(model, found)
    data = with_bar(f"prepare {name}", lambda progress: build_task(name, tokenizer))
    data.check_model(found)
    return found, data


def opened_model(model: str, streamed: bool = False) -> tuple[PreTrainedModel, Any]:
    """(model, its tokenizer or None)."""
    from headprune.sources import open_from_disk, open_model, opening

    if streamed:
        return open_from_disk(model)
    return with_bar(opening(model), lambda progress: open_model(model, progress))
