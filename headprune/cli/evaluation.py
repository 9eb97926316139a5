"""Commands that measure models and this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from headprune.cli import terminal
from headprune.cli.app import app
from headprune.cli.inputs import ModelArgument, TaskOption, opened, opened_model
from headprune.cli.terminal import with_bar


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    task: TaskOption = None,
    against: Annotated[str | None, typer.Option(help="The dense model, measured in the same run.")] = None,
) -> None:
    """Quality and cost of a model, alone or beside its dense original."""
    from headprune.evaluation import compare, evaluate

    found, data = opened(model, task)
    if against is None:
        terminal.console.print(with_bar("evaluate", lambda progress: evaluate(found, data, progress=progress)))
    else:
        dense, _ = opened_model(against)
        terminal.console.print(with_bar("evaluate", lambda progress: compare(dense, found, data, progress=progress)))


@app.command()
def doctor() -> None:
    """Versions, devices, and which backend runs each operator and why."""
    from headprune.report.doctor import doctor_tables

    for table in doctor_tables():
        terminal.console.print(table)
