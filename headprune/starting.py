"""Ctrl-C while the command line still imports torch, which takes seconds: it ends the process as later on, without a traceback.

Acts when it is imported, before torch is.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

STOPPED = 130  # the exit code


def is_command() -> bool:
    """Whether Python runs the script `headprune` or `-m headprune`, of which sys.argv holds the -m alone until all is imported."""
    program = "".join(sys.argv[:1])
    return "headprune" in sys.orig_argv if program == "-m" else Path(program).stem == "headprune"


def end(*_: object) -> None:
    os._exit(STOPPED)


def started() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
