"""The command that lists the schedules."""

from __future__ import annotations

from rich.table import Table

from headprune.cli import terminal
from headprune.cli.app import app


@app.command("schedules")
def schedules_command() -> None:
    """List the schedules that a recipe can name, with their options, and the ways to train gates."""
    from headprune import schedules

    table = Table("schedule", "what it does", "options in a recipe")
    for name, found in schedules.schedules().items():
        table.add_row(name, found.__doc__.split("\n")[0], ", ".join(schedules.recipe_options(name)))
    terminal.console.print(table)
    table = Table("pruning_aware method", "the gates")
    for name, found in schedules.gate_methods().items():
        table.add_row(name, found.__doc__.split("\n")[0])
    terminal.console.print(table)
