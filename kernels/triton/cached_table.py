"""Tables on a device that follow from a few numbers: made once, and kept while they are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch

_in_graphs: dict[int, Any] = {}


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def cached_table(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `lru_cache`, but what is asked for while a CUDA graph is captured is never forgotten: the graph knows its address."""

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        cached = lru_cache(maxsize)(make)

        @wraps(make)
        def table(*key: Any) -> Any:
            found = cached(*key)
            if capturing():
                _in_graphs[id(found)] = found
            return found

        return table

    return decorate
