"""The name of an attention as a cell of a table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text


@dataclass(frozen=True)
class NameCell:
    """Where a narrow table breaks `name`, it does so behind a dot, so that the name can be read and typed again."""

    name: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in self.parts:
            if lines[-1] and len(lines[-1] + part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self.parts), default=0), len(self.name))

    @property
    def parts(self) -> list[str]:
        return re.findall(r"[^.]*\.|[^.]+", self.name)
