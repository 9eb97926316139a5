"""The command that lists the schedules."""

from __future__ import annotations

from rich.table import Table

from headprune.cli import terminal
from headprune.cli.app import app
from headprune.cli.completion import first_line
from headprune.cli.inputs import JsonOption


@app.command("schedules", epilog="Example: headprune schedules")
def schedules_command(json: JsonOption = False) -> None:
    """List the schedules that a recipe can name, with their options, and the ways to train gates."""
    from headprune import schedules

    listed = Table("schedule", "what it does", "options in a recipe")
    for name, found in schedules.schedules().items():
        listed.add_row(name, first_line(found), ", ".join(schedules.recipe_options(name)))
    gates = Table("pruning_aware method", "the gates")
    for name, method in schedules.gate_methods().items():
        gates.add_row(name, first_line(method))
    terminal.show(json, {"schedules": terminal.rows_of(listed), "gate_methods": terminal.rows_of(gates)}, listed, gates)
