"""Commands that cut, convert and show models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headprune.cli import terminal
from headprune.cli.app import app
from headprune.cli.inputs import ModelArgument, OutputOption, opened, opened_model
from headprune.cli.terminal import with_bar


@app.command("prune")
def prune_command(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="plan.json from `headprune plan`.")],
    output: OutputOption,
    task: Annotated[str | None, typer.Option(help="Re-solve the output projections on this task's calibration data.")] = None,
) -> None:
    """Cut the heads that a plan lets go and save the smaller model."""
    from headprune.planning import PruningPlan
    from headprune.surgery import prune, save

    chosen = PruningPlan.load(plan)
    if task is None:
        dense, tokenizer = opened_model(model)
        prune(dense, chosen)
    else:
        dense, data = opened(model, task)
        tokenizer = data.tokenizer
        with_bar("re-solve output projections", lambda progress: prune(
            dense, chosen, data.calibration, forward=data.forward, progress=progress
        ))  # fmt: skip
    save(dense, output, tokenizer=tokenizer)
    terminal.console.print(chosen)
    terminal.console.print(f"written to {output}")


@app.command("export")
def export_command(
    model: ModelArgument, to: Annotated[str, typer.Option(help="stock, onnx, gguf or vllm.")], output: OutputOption
) -> None:
    """Write a pruned model for another engine; its outputs are checked to stay the same."""
    from headprune.surgery.export import export

    found, tokenizer = opened_model(model)
    terminal.console.print(str(with_bar(f"export to {to}", lambda progress: export(found, to, output, tokenizer=tokenizer))))


@app.command()
def inspect(model: ModelArgument) -> None:
    """The attention sites and head maps of a model folder."""
    from headprune.report.tables import sites_table
    from headprune.sources import model_folder, opening
    from headprune.surgery.checkpoint import skeleton

    found = with_bar(opening(model), lambda progress: skeleton(model_folder(model, progress)))
    terminal.console.print(sites_table(found))
