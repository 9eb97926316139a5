"""The application that the commands register with, and how it ends."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer
from huggingface_hub import constants
from rich.markup import escape

from headprune.cli import terminal
from headprune.errors import HeadpruneError

# Models are folders here; nothing is ever fetched. Said twice: huggingface_hub has read the variable already, later processes will.
if os.environ.setdefault("HF_HUB_OFFLINE", "1") == "1":
    constants.HF_HUB_OFFLINE = True
WRONG_INPUT, STOPPED = 2, 130
EXIT_CODES = (
    f"Exit codes: 0 done; {WRONG_INPUT} something that you can put right, said in one line on stderr; {STOPPED} stopped by Ctrl-C: "
    "nothing is half-written, and run, demo and recover go on from there when called again; 1 an error in headprune."
)
app = typer.Typer(name="headprune", epilog=EXIT_CODES, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def options(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings, results and errors alone.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also what headprune logs, on stderr.")] = False,
) -> None:
    """Score, choose, cut and recover attention heads: smaller dense transformers that run faster."""
    terminal.progress_console.quiet = quiet
    if verbose:
        handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("headprune")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        context.call_on_close(lambda: logger.removeHandler(handler))


def main() -> None:
    """Runs the command line: errors that the user can put right are one line on stderr and exit code 2."""
    try:
        quiet_transformers()
        app()
    except HeadpruneError as error:
        say(f"[bold red]error:[/] {one_line(error)}")
        sys.exit(WRONG_INPUT)
    except SystemExit as ended:
        if ended.code == STOPPED:  # typer ends so on Ctrl-C
            say("stopped; nothing is half-written, and a run goes on from here with the same command")
        raise


def say(text: str) -> None:
    """One line on stderr, however quiet the rest is."""
    terminal.progress_console.quiet = False
    terminal.progress_console.print(text, highlight=False, soft_wrap=True)


def one_line(error: Exception) -> str:
    return escape(" ".join(str(error).split()))


def quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
