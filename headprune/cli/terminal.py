"""Where commands print: results to stdout, progress, warnings and errors to stderr."""

from __future__ import annotations

from rich.console import Console

console = Console()
progress_console = Console(stderr=True)


def with_bar(title: str, work):
    from headprune.report.progress import Stages

    with Stages(progress_console).stage(title) as progress:
        return work(progress)
