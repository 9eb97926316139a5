"""The peers: every package on PyPI that is said to prune attention heads, what installs it, and what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TORCH = "torch==2.13.0"
TRANSFORMERS_4 = "transformers==4.57.6"


@dataclass(frozen=True)
class Peer:
    """name: of its row. package: the distribution whose version the row tells. installs: pip's arguments, one call after the
    other, in an environment of its own; none: the project's own environment. script: what runs it there; None where it has
    nothing to run, and then `lacks` says what it does in place of pruning heads, and how that was found. options: for the script.
    """

    name: str
    package: str
    script: str | None
    installs: Sequence[Sequence[str]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    lacks: str = ""

    @property
    def environment(self) -> str | None:
        """Peers that install the same share one."""
        return None if not self.installs else self.package
