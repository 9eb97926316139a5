"""Commands that cut, convert and show models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprune.cli import completion, terminal
from headprune.cli.app import app
from headprune.cli.completion import one_of
from headprune.cli.inputs import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    ModelOutputOption,
    OverwriteOption,
    StreamedOption,
    opened,
    opened_model,
    refuse_replacing_source,
    writable,
)
from headprune.cli.terminal import with_bar
from headprune.errors import InvalidInput
from headprune.model_folder import refuse_replacing

if TYPE_CHECKING:  # commands import what they need when they run
    from transformers import PreTrainedModel

    from headprune.planning import PruningPlan


@app.command("prune", epilog="Example: headprune prune minilm plan.json -o pruned --task docstring-retrieval")
def prune_command(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="plan.json from `headprune plan`.")],
    output: ModelOutputOption,
    task: Annotated[
        str | None,
        typer.Option(
            help="Re-solve the output projections on this task's calibration data.", autocompletion=one_of(completion.tasks)
        ),
    ] = None,
    streamed: StreamedOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Cut the heads that a plan lets go and save the smaller model."""
    from headprune.embedded import EMBEDDED
    from headprune.planning import PruningPlan
    from headprune.sources import model_folder
    from headprune.surgery import prune, save
    from headprune.surgery.checkpoint import names_base

    refuse_replacing_source(model, output)
    refuse_replacing(output, overwrite)
    chosen = PruningPlan.load(plan)
    if streamed:
        prune_in_files(model, chosen, output, task, device, overwrite)
    elif task is None:
        base = model not in EMBEDDED and names_base(model_folder(model), chosen)
        dense, _ = opened_model(model, device=device, base=base)
        with_bar("cut", lambda progress: prune(dense, chosen, progress=progress))
        with_bar("save", lambda progress: save(dense, output, overwrite=overwrite))
    else:
        dense, data = opened(model, task, device=device)
        with_bar("re-solve output projections and cut", lambda progress: prune(
            dense, chosen, data.calibration, forward=data.forward, progress=progress
        ))  # fmt: skip
        with_bar("save", lambda progress: save(dense, output, overwrite=overwrite))
    kept = {
        "model": str(output),
        "removed_heads": chosen.removed_heads,
        "keep": {name: list(heads) for name, heads in chosen.items()},
    }
    terminal.show(json, kept, chosen, f"written to {output}")


def prune_in_files(model: str, plan: PruningPlan, output: Path, task: str | None, device: str, overwrite: bool) -> None:
    from headprune.models.placement import chosen_device
    from headprune.sources import model_folder
    from headprune.surgery import prune_folder

    data = None if task is None else opened(model, task, streamed=True, device=device)[1]
    with_bar("prune file by file", lambda progress: prune_folder(
        model_folder(model), plan, output, None if data is None else data.calibration,
        forward=None if data is None else data.forward, device=chosen_device(device),
        overwrite=overwrite, progress=progress,
    ))  # fmt: skip


@app.command("export", epilog="Example: headprune export ./pruned --to gguf -o pruned.gguf")
def export_command(
    model: ModelArgument,
    to: Annotated[
        str, typer.Option(help="stock, onnx, gguf, vllm or nemotron-nas.", autocompletion=one_of(completion.export_targets))
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.", callback=writable)],
    option: Annotated[
        list[str] | None, typer.Option(help="Of the target: dtype=q8_0 for gguf, opset=20 for onnx; may be repeated.")
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Write a pruned model for another engine; its outputs are checked to stay the same."""
    from headprune.surgery.export import export
    from headprune.surgery.export.target import refuse_output

    refuse_replacing_source(model, output)
    refuse_output(to, output, overwrite)
    options = target_options(option or ())
    taken = sorted(options.keys() & signature(export).parameters.keys() - {"source"})
    if taken:
        raise InvalidInput(
            f"--option {taken[0]}: expected an option of the target, such as dtype=q8_0 for gguf, opset=20 for onnx."
        )
    found, _ = opened_model(model)
    written = with_bar(f"export to {to}", lambda progress: export(found, to, output, overwrite=overwrite, **options))
    terminal.show(json, {**asdict(written), "path": str(written.path)}, str(written))


def target_options(given: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given:
        name, separator, value = one.partition("=")
        if not separator or not name or not value:
            raise InvalidInput(f"option {one!r}: expected name=value, for example dtype=q8_0.")
        found[name] = int(value) if value.isdecimal() else value
    return found


@app.command(epilog="Example: headprune inspect ./pruned")
def inspect(model: ModelArgument, json: JsonOption = False) -> None:
    """The attentions of a model folder and the heads that each of them has."""
    from headprune.report.tables import site_rows, sites_table

    found = bones(model)
    terminal.show(json, {"model": type(found).__name__, "attentions": site_rows(found)}, sites_table(found))


@app.command("diff", epilog="Example: headprune diff minilm ./pruned")
def diff_command(before: ModelArgument, after: ModelArgument, json: JsonOption = False) -> None:
    """What the second model has lost against the first: heads, parameters, FLOPs, cache bytes per token."""
    from headprune.surgery import diff

    found = diff(bones(before), bones(after))
    terminal.show(json, found.to_json(), found)


def bones(model: str) -> PreTrainedModel:
    """The model without its weights."""
    from headprune.sources import model_folder, opening
    from headprune.surgery.checkpoint import skeleton

    return with_bar(opening(model), lambda progress: skeleton(model_folder(model, progress, weights=False)))
