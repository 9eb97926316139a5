"""Restarts a model in the middle of its forward pass, of whatever family it is.

One traced pass shows every call of every module, in order. All calls that are over before a site's output projection is
called cannot depend on that site's gates: in a replay each of them returns at once what it returned in the dense pass, and
only what comes after is computed. Of nested calls the outermost one that is over counts (a whole layer, a whole encoder).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from headprune.models.calls import watching_calls
from headprune.models.replaced import replaced_forward
from headprune.scoring.folding import FOREIGN, Dims, folded, shapes

Plan = Mapping[nn.Module, Sequence[int | None]]  # for each call of a module: the traced call whose result it returns, or None


@dataclass(frozen=True)
class Call:
    """One call of a module: `shapes` of what it received and returned, and the ticks of the trace's clock at both."""

    module: nn.Module
    received: tuple[Any, ...]
    returned: tuple[Any, ...]
    entered: int
    left: int

    @property
    def storable(self) -> bool:
        return FOREIGN not in self.returned


@contextmanager
def tracing(model: nn.Module) -> Iterator[list[Call]]:
    """The list fills with all calls inside the block; in order of entry once the block has ended."""
    calls: list[Call] = []
    clock = count()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[nn.Module, int, tuple[Any, ...]]:
        return module, next(clock), shapes(args)

    def leave(begun: tuple[nn.Module, int, tuple[Any, ...]], output: Any) -> None:
        module, entered, received = begun
        calls.append(Call(module, received, shapes(output), entered, next(clock)))

    with watching_calls(set(model.modules()), enter, leave):
        yield calls
    calls.sort(key=lambda call: call.entered)


def plan_until(calls: Sequence[Call], storable: Sequence[bool], target: nn.Module) -> Plan:
    """What a replay that starts at the first call of `target` takes from the dense pass."""
    start = next(call.entered for call in calls if call.module is target)
    actions: dict[nn.Module, list[int | None]] = defaultdict(list)
    covered = -1
    for index, call in enumerate(calls):
        if call.left < covered:
            continue  # inside a call that is not made again
        taken = call.left < start and storable[index]
        actions[call.module].append(index if taken else None)
        if taken:
            covered = call.left
    return {module: taken for module, taken in actions.items() if any(index is not None for index in taken)}


@contextmanager
def recording(calls: Sequence[Call], plans: Sequence[Plan], stored: dict[int, Any]) -> Iterator[None]:
    """Inside the block a pass leaves in `stored` what the `plans` take from it: index of a call -> copy of its result.

    A pass that calls one of these modules more or less often than the trace leaves nothing.
    """
    wanted = {index for plan in plans for taken in plan.values() for index in taken if index is not None}
    of_module: dict[nn.Module, list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        of_module[call.module].append(index)
    watched = {calls[index].module for index in wanted}
    seen: Counter[nn.Module] = Counter()

    def keep(module: nn.Module, output: Any) -> None:
        number = seen[module]
        seen[module] += 1
        if number < len(of_module[module]) and of_module[module][number] in wanted:
            copy = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, output)
            stored[of_module[module][number]] = copy

    with watching_calls(watched, lambda module, _args: module, keep):
        yield
    if any(seen[module] != len(of_module[module]) for module in watched):
        stored.clear()


@contextmanager
def replaying(plan: Plan, stored: Mapping[int, Any], dims: Sequence[Dims | None], times: int) -> Iterator[None]:
    """Inside the block one pass over the batch taken `times` times starts where `plan` ends."""

    def replayed(forward: Callable[..., Any], taken: Sequence[int | None]) -> Callable[..., Any]:
        queue = iter(taken)

        def run(*args: Any, **kwargs: Any) -> Any:
            index = next(queue, None)
            dim = None if index is None else dims[index]
            return forward(*args, **kwargs) if index is None or dim is None else folded(stored[index], dim, times)

        return run

    with ExitStack() as stack:
        for module, taken in plan.items():
            stack.enter_context(replaced_forward(module, replayed(module.forward, taken)))
        yield
