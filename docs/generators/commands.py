"""The command line, from the typer application: every command with its arguments, options and example."""

from __future__ import annotations

import typer

from headprune.cli import app
from headprune.cli.app import EXIT_CODES

from .registry import generator, plain, table


@generator("commands")
def commands() -> str:
    group = typer.main.get_command(app)
    before = f"Before the command:\n\n{parameters(group)}\n\n{plain(EXIT_CODES)}"
    return "\n\n".join([before, *(section(name, command) for name, command in group.commands.items())])


def section(name: str, command) -> str:
    usage = " ".join(["headprune", name, *command.collect_usage_pieces(context_of(command))])
    example = command.epilog.removeprefix("Example: ")
    parts = [
        f"## `{name}` {{ #{name} }}",
        plain(command.help),
        f"```text\n{usage}\n```",
        parameters(command),
        f"```\n{example}\n```",
    ]
    return "\n\n".join(parts)


def context_of(command):
    return command.make_context(command.name, [], resilient_parsing=True)


def parameters(command) -> str:
    context = context_of(command)
    rows = [[label(one, context), plain(one.help or ""), default(one)] for one in command.params if not one.hidden]
    return table(["argument or option", "what it is", "by default"], rows)


def label(one, context) -> str:
    if one.param_type_name == "argument":
        return f"`{one.name}`"
    takes = "" if one.is_flag else f" {plain(one.display_type(context))}"
    return ", ".join(f"`{option}`" for option in sorted(one.opts, key=len, reverse=True)) + takes


def default(one) -> str:
    """What stands in for a parameter that is not given: its default as told, or nothing."""
    if one.required:
        return "required"
    value = one.show_default if isinstance(one.show_default, str) else one.default
    return "" if value in (None, False, (), []) or callable(value) else f"`{value}`"
