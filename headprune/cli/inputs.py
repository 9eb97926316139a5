"""What several commands take: a model, its task, a budget, a place for the output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprune.cli import completion
from headprune.cli.terminal import with_bar
from headprune.errors import InvalidInput
from headprune.files import refuse_unwritable

if TYPE_CHECKING:  # commands import what they need when they run
    from transformers import PreTrainedModel

    from headprune.evaluation.tasks import Task


def asked_first(refuse: Callable[[Path], object]) -> Callable[[typer.Context, Path | None], Path | None]:
    """What checks a path that was given to write to: whether that can be is asked before the work, not after it."""

    def check(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            refuse(path)
        return path

    return check


writable = asked_first(refuse_unwritable)
writable_file = asked_first(partial(refuse_unwritable, file=True))
writable_folder = asked_first(partial(refuse_unwritable, file=False))


def refuse_unread(needs: str, there: bool, **given: Any) -> None:
    """InvalidInput where an option is given that counts with `needs` alone, which is not `there`."""
    for name, value in given.items():
        if value is not None and not there:
            raise InvalidInput(f"--{name.replace('_', '-')} is given without {needs}, and would not be read; give {needs} too.")


def refuse_budgets(**given: float | None) -> None:
    """InvalidInput unless exactly one of a command's options for the budget is given."""
    first, *others = (f"--{name.replace('_', '-')}" for name in given)
    found = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if not found:
        raise InvalidInput(f"how much is to go? Give {first} 0.5 (half of the query heads), or one of {', '.join(others)}.")
    if len(found) > 1:
        raise InvalidInput(f"{', '.join(found)} are given, and a budget is one of them; leave out the others.")


def refuse_replacing_source(model: str, output: Path) -> None:
    """InvalidInput where the folder `model`, which may be the only copy of its weights, is to be written over."""
    if Path(model).is_dir() and output.resolve() == Path(model).resolve():
        raise InvalidInput(f"--output {output} is the model that is read; give another folder.")


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A model folder, owner/name on the Hub, or an embedded model: minilm, stdlib-lm.",
        autocompletion=completion.one_of(completion.models),
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="The data: docstring-retrieval (default for encoders), standard-library-text (for language models), or your own: "
        "text,calibration=FILE, chat, masked-text, text-to-text, retrieval, text-classification, token-classification, "
        "question-answering, image-classification, speech-recognition.",
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
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The file to write.", callback=writable_file)]
ModelOutputOption = Annotated[Path, typer.Option("--output", "-o", help="The model folder to write.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a model in the output folder that headprune did not write, or a file, too.")
]
StreamedOption = Annotated[
    bool, typer.Option("--streamed", help="Read the weights layer by layer, for models that do not fit into memory.")
]

DeviceOption = Annotated[
    str, typer.Option("--device", help="Where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1.")
]

# A budget: one of these.
HeadsOption = Annotated[float | None, typer.Option("--heads", help="Fraction of the query heads to remove.")]
ParamsOption = Annotated[float | None, typer.Option("--params", help="Fraction of the attention parameters to remove.")]
KvCacheOption = Annotated[float | None, typer.Option("--kv-cache", help="Fraction of the key/value cache to remove.")]
FlopsOption = Annotated[float | None, typer.Option("--flops", help="Fraction of the attention FLOPs to remove.")]


BitsOption = Annotated[
    int | None,
    typer.Option(help="Load the weights in 4 or 8 bits (bitsandbytes): a larger model fits; a plan is for the model itself."),
]


def opened(
    model: str, task: str | None, streamed: bool = False, device: str = "cpu", bits: int | None = None
) -> tuple[PreTrainedModel, Task]:
    """(model, task), the task by its name and options or the one for such models."""
    from headprune.evaluation.tasks import build_task, check_task_options, named_task
    from headprune.sources import default_task

    name, options = (default_task(model), {}) if task is None else named_task(task)
    kind = check_task_options(name, options)
    found, tokenizer = opened_model(model, streamed, device, kind.base, bits)
    kind.check_options(found, options)
    data = with_bar(f"prepare {name}", lambda progress: build_task(name, tokenizer, **options))
    data.check_model(found)
    return found, data


def opened_model(
    model: str, streamed: bool = False, device: str = "cpu", base: bool = False, bits: int | None = None
) -> tuple[PreTrainedModel, Any]:
    """(model, its tokenizer or None); base: as in `hp.load`; bits: as in `open_model`."""
    from headprune.models.placement import chosen_device
    from headprune.sources import open_from_disk, open_model, opening

    place = chosen_device(device)
    if streamed and bits is not None:
        raise InvalidInput(f"--streamed and --bits {bits} were given; weights read layer by layer are taken as they are.")
    if streamed:
        return open_from_disk(model, place, base)
    return with_bar(opening(model), lambda progress: open_model(model, progress, place, base, bits))
