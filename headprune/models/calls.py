"""Every call of a model's modules, from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

T = TypeVar("T")


@contextmanager
def watching_calls(
    modules: Container[nn.Module], entered: Callable[[nn.Module, tuple[Any, ...]], T], left: Callable[[T, Any], None]
) -> Iterator[None]:
    """Inside the block `entered(module, args)` sees the beginning of every call of one of `modules`, and `left(what that gave,
    result)` its end; of a call that fails there is none.

    The result is what forward gave: hooks of the module's own change it later, and again where it is given in place of forward.
    """
    opened: list[tuple[nn.Module, T]] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in modules:
            opened.append((module, entered(module, args)))

    def leave(module: nn.Module, _args: Any, result: Any) -> None:
        if module in modules:
            while opened[-1][0] is not module:  # calls that failed, which a caller then did without
                opened.pop()
            left(opened.pop()[1], result)

    # Two hooks for all modules: two for each would take longer than a small model's layer runs.
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
