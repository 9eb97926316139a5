"""What several commands take: a model, its task, a place for the output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprune.cli.terminal import with_bar

if TYPE_CHECKING:  # commands import what they need when they run
    from transformers import PreTrainedModel

    from headprune.evaluation.tasks import Task

ModelArgument = Annotated[str, typer.Argument(help="A model folder, or an embedded model: minilm, stdlib-lm.")]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", help="The data: docstring-retrieval (default for encoders), standard-library-text (for language models)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of tables.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]


StreamedOption = Annotated[
    bool, typer.Option("--streamed", help="Read the weights layer by layer, for models that do not fit into memory.")
]


def opened(model: str, task: str | None, streamed: bool = False) -> tuple[PreTrainedModel, Task]:
    """(model, task), the task by its name or the one for such models."""
    from headprune.evaluation.tasks import build_task, check_task
    from headprune.sources import default_task

    if task is not None:
        check_task(task)
    found, tokenizer = opened_model(model, streamed)
    data = build_task(task or default_task(model, found), tokenizer)
    data.check_model(found)
    return found, data


def opened_model(model: str, streamed: bool = False) -> tuple[PreTrainedModel, Any]:
    """(model, its tokenizer or None)."""
    from headprune.sources import open_from_disk, open_model, opening

    if streamed:
        return open_from_disk(model)
    return with_bar(opening(model), lambda progress: open_model(model, progress))
