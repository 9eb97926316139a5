"""The application that the commands register with, and how it ends."""

from __future__ import annotations

import os
import sys

import typer
from huggingface_hub import constants
from rich.markup import escape

from headprune.cli import terminal
from headprune.errors import HeadpruneError

# Models are folders here; nothing is ever fetched. Said twice: huggingface_hub has read the variable already, later processes will.
if os.environ.setdefault("HF_HUB_OFFLINE", "1") == "1":
    constants.HF_HUB_OFFLINE = True
app = typer.Typer(
    name="headprune",
    help="Score, choose, cut and recover attention heads: smaller dense transformers that run faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line: errors that the user can put right are one line on stderr and exit code 2."""
    try:
        quiet_transformers()
        app()
    except HeadpruneError as error:
        terminal.progress_console.print(f"[bold red]error:[/] {one_line(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        terminal.progress_console.print("stopped; the same command goes on from here")
        sys.exit(130)


def one_line(error: Exception) -> str:
    return escape(" ".join(str(error).split()))


def quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
