"""The application that the commands register with, and how it ends."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars
from rich.markup import escape

from headprune.cli import terminal
from headprune.errors import HeadpruneError, InvalidInput
from headprune.starting import STOPPED, started
from headprune.version import __version__
from headprune.when_imported import when_imported

# Nothing is ever fetched unless asked for. Said twice: huggingface_hub has read the variable already, later processes will.
if os.environ.setdefault("HF_HUB_OFFLINE", "1") == "1":
    constants.HF_HUB_OFFLINE = True
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, writes to stderr otherwise
for chatty in ("torchao", "torch.utils._pytree", "bitsandbytes.backends"):  # when imported: which kernels this machine lacks
    logging.getLogger(chatty).setLevel(logging.ERROR)
BROKEN, WRONG_INPUT, TERMINATED = 1, 2, 143
EXIT_CODES = (
    f"Exit codes: 0 done; {WRONG_INPUT} something that you can put right, said in one line on stderr; {STOPPED} stopped by Ctrl-C, "
    f"{TERMINATED} by SIGTERM: nothing is half-written, and run, demo, recover, compare and score --streamed go on from there when "
    f"called again; {BROKEN} an error in headprune."
)
REFUSALS = {
    getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG", "ELOOP")
}
app = typer.Typer(name="headprune", epilog=EXIT_CODES, no_args_is_help=True, pretty_exceptions_enable=False)
log = logging.getLogger("headprune")


def show_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        terminal.console.print(f"headprune {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings, results and errors alone.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also what headprune logs and where an error comes from, on stderr.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Score, choose, cut and recover attention heads: smaller dense transformers that run faster."""
    if quiet and verbose:
        raise InvalidInput("--quiet and --verbose were given; give one of them.")
    terminal.progress_console.quiet = quiet
    if quiet:
        warnings.simplefilter("ignore")
        disable_progress_bars()  # of downloads
    if verbose:
        context.obj.setLevel(logging.INFO)
        log.setLevel(logging.INFO)


def main() -> None:
    """Runs the command line: what the user can put right is one line on stderr and exit code 2."""
    started()
    terminal.take_every_character()
    with terminal.log_shown() as shown, unwound_by_sigterm():
        try:
            when_imported("transformers.utils.logging", quiet_transformers)
            code = app(prog_name="headprune", standalone_mode=False, obj=shown) or 0
        except HeadpruneError as error:
            log.info("where the error comes from:", exc_info=error)
            say(f"[bold red]error:[/] {one_line(error)}")
            code = WRONG_INPUT
        except Exception as error:
            code = misused(error) or refused(error) or broken()
        except SystemExit as ended:
            code = ended.code
    if code in (STOPPED, TERMINATED):  # typer ends with the former on Ctrl-C
        say("stopped; nothing is half-written, and a run goes on from here with the same command")
    sys.exit(code)


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """In the block SIGTERM, by which batch systems and containers end a process, leaves as little behind as Ctrl-C."""

    def end(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def misused(error: Exception) -> int | None:
    """Tells of an argument or option that typer refuses, whose errors have moved between its releases; None for other errors."""
    if not hasattr(error, "format_message"):
        return None
    message, context = one_line(error.format_message()), getattr(error, "ctx", None)
    if message:  # without: headprune alone, which has shown its help
        command = "headprune" if context is None else context.command_path
        say(f"[bold red]error:[/] {message.rstrip('.')}. See {command} --help.")
    return WRONG_INPUT


def refused(error: Exception) -> int | None:
    """Tells of what the system refuses to read or to print: a folder of somebody else, a full disk; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    log.info("where the error comes from:", exc_info=error)
    say(f"[bold red]error:[/] {one_line(error.filename or 'what was to be written')}: {error.strerror}.")
    return WRONG_INPUT


def broken() -> int:
    traceback.print_exc()
    say("[bold red]error in headprune:[/] please report it with the lines above")
    return BROKEN


def say(text: str) -> None:
    """One line on stderr, however quiet the rest is."""
    terminal.progress_console.quiet = False
    terminal.progress_console.print(text, highlight=False, soft_wrap=True)


def one_line(error: object) -> str:
    return escape(" ".join(str(error).split()))


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
