"""Progress bars for the stages of a run, and what each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from headprune.evaluation.process_memory import process_peak


@dataclass(frozen=True)
class Stage:
    """What a stage took. peak_memory_bytes: the most that was resident in the process, with the model and all else in it;
    peak_device_bytes: that its tensors took on a GPU. None: not known."""

    title: str
    seconds: float
    peak_memory_bytes: int | None
    peak_device_bytes: int | None


class Stages:
    """Shows one bar per stage on `console` while it works, and how long it took when it is done. done: all of them, in order."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.done: list[Stage] = []

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(stage) for stage in self.done]

    def __rich__(self) -> Table:
        table = Table(title="what it took", title_justify="left")
        for column in ("stage", "seconds", "peak memory, MB"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for stage in self.done:
            peaks = [f"{peak / 1e6:,.0f}" for peak in (stage.peak_memory_bytes, stage.peak_device_bytes) if peak is not None]
            table.add_row(escape(stage.title), f"{stage.seconds:.1f}", " + GPU ".join(peaks) or "not known")
        return table

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Gives `progress(done, total)` to the block."""
        started = time.perf_counter()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        plain = not (self.console.is_terminal or self.console.is_jupyter)  # a file gets the line below alone
        with Progress(*columns, console=self.console, transient=True, disable=plain) as bars, process_peak() as peak:
            bar = bars.add_task(escape(title), total=None)
            yield lambda done, total: bars.update(bar, completed=done, total=total)
        self.done.append(Stage(title, time.perf_counter() - started, *peak()))
        self.console.print(f"[green]✓[/] {escape(title)} [dim]{self.done[-1].seconds:.1f} s[/]")
