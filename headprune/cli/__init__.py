"""The command line: each command is one arrow of the way, over the public API; a file for each group of commands."""

from headprune.cli import runs, scoring, planning, surgery, recovery, schedules, evaluation, comparison  # isort: skip (the order in the help)
from headprune.cli.app import app, main

__all__ = ["app", "comparison", "evaluation", "main", "planning", "recovery", "runs", "schedules", "scoring", "surgery"]
