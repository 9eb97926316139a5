"""A forward pass taken in steps, from one attention to the next, so that a layer is run once though all are solved in turn.

At a stop, some module calls are over. They cannot depend on what is changed at this attention or behind it, so in the next step
each of them returns at once what it returned before (of nested calls the outermost that is over counts: a whole layer). An
attention whose keys and values later layers read leaves them outside of its result: it is called again, and only its parts not. The
same restart in the middle serves head masks in `headprune.scoring.replay`, where nothing is solved on the way.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from headprune.errors import InvalidInput
from headprune.kv_sharing import gives_keys
from headprune.models.calls import watching_calls
from headprune.models.feed_forward import FeedForward
from headprune.models.gating import output_input_hook
from headprune.models.replaced import replaced_forward
from headprune.models.site import AttentionSite
from headprune.models.stream import first_tensor
from headprune.surgery.readout import compared, states_and_output

Keeping = Literal["last", "all", "nothing"]


class _Reached(Exception):
    """Stops a forward pass at the attention that is being measured."""


class _Changed(Exception):
    """A result was changed in place after its module had returned it."""


@dataclass(eq=False)
class Called:
    """One call of a module in a step: its result and the version of each tensor in it, once it is over. again: it leaves more than
    a result, so that only what is inside counts as over."""

    module: nn.Module
    inside: list[Called] = field(default_factory=list)
    over: bool = False
    again: bool = False
    result: Any = None
    versions: tuple[int, ...] = ()

    def finished(self) -> list[Called]:
        """The outermost calls that are over, in order."""
        return [self] if self.over else [call for inner in self.inside for call in inner.finished()]


@dataclass
class Walk:
    """The forward pass of one batch.

    run: makes it, from the start. keeping: what is remembered at a stop: of the finished members of a stack (a ModuleList)
    the "last" result, "all" results, or "nothing", so that every step runs from the start.
    """

    model: nn.Module
    run: Callable[[], Any]
    keeping: Keeping = "all"
    _finished: list[Called] = field(default_factory=list)
    _stack_of: dict[nn.Module, nn.ModuleList | None] = field(default_factory=dict)  # of every module of the model

    def __post_init__(self) -> None:
        if not self._stack_of:
            self._stack_of = dict.fromkeys(self.model.modules())
            stacks = [module for module in self._stack_of if isinstance(module, nn.ModuleList)]
            self._stack_of |= {member: stack for stack in stacks for member in stack}

    def to(self, site: AttentionSite | FeedForward, stream: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """Goes on to `site`: the input of its output projection and what `stream` received, both [batch, tokens, features].

        Raises InvalidInput where the batch does not run through the site.
        """
        try:
            found = self._step(site, stream)
        except _Changed:
            self.keeping = "nothing"
            found = self._step(site, stream)
        if found is None and self._finished:
            self._finished = []
            found = self._step(site, stream)
        if found is None:
            raise InvalidInput(f"{site.name} was not reached by the calibration data.")
        return found

    def every(self, site: AttentionSite | FeedForward, stream: nn.Module | None) -> list[tuple[Tensor, Tensor | None]]:
        """What `to` gives, of every call of a site that runs several times; the walk stays where it stands.

        Raises InvalidInput where the batch does not run through the site.
        """
        found: list[tuple[Tensor, Tensor | None]] = []
        with watching(site, stream, lambda inputs, entered: found.append((inputs, entered))):
            self.end()
        if not found:
            raise InvalidInput(f"{site.name} was not reached by the calibration data.")
        return found

    def end(self) -> Any:
        """Goes on to the end: what `run` gives."""
        with ExitStack() as stack:
            if self.keeping != "nothing":
                self._replay(stack)
            return self.run()

    def copy(self) -> Walk:
        """Another walk that stands where this one does; either can go on."""
        return Walk(self.model, self.run, self.keeping, self._finished, self._stack_of)

    def _step(self, site: AttentionSite | FeedForward, stream: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
        found: list[tuple[Tensor, Tensor | None]] = []
        top = Called(self.model)

        def stop(inputs: Tensor, entered: Tensor | None) -> None:
            found.append((inputs, entered))
            raise _Reached

        with ExitStack() as stack:
            if self.keeping != "nothing":
                self._replay(stack)
                record(self._stack_of, top, stack)
            stack.enter_context(watching(site, stream, stop))
            try:
                self.run()
            except _Reached:
                self._finished = self._remembered(top)
                return found[0]
        return None

    def _replay(self, stack: ExitStack) -> None:
        results: dict[nn.Module, deque[Any]] = defaultdict(deque)
        for call in self._finished:
            results[call.module].append(call.result)
        for module, queue in results.items():
            stack.enter_context(replaced_forward(module, replayed(module.forward, queue)))

    def _remembered(self, top: Called) -> list[Called]:
        finished = top.finished()
        if changed(finished):
            self._finished = []
            raise _Changed
        if self.keeping == "last":
            stacked = [call for call in finished if self._stack_of[call.module] is not None]
            last = {self._stack_of[call.module]: call for call in stacked}
            for call in stacked:
                if last[self._stack_of[call.module]] is not call:
                    call.result = tree_map(hollow, call.result)
                    call.versions = versions(call.result)
        return finished


@contextmanager
def watching(
    site: AttentionSite | FeedForward, stream: nn.Module | None, reached: Callable[[Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Inside the block `reached` sees at every call of the site the input of its output projection, and what `stream` received."""
    entered: list[Tensor | None] = [None]

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entered[0] = first_tensor((*args, *kwargs.values()))

    with ExitStack() as stack:
        stack.enter_context(output_input_hook(site, lambda inputs: reached(inputs, entered[0])))
        if stream is not None:
            stack.callback(stream.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def record(modules: Container[nn.Module], top: Called, stack: ExitStack) -> None:
    """Until `stack` ends, every call of one of `modules` becomes part of `top`."""
    opened = [top]

    def enter(module: nn.Module, _args: Any) -> Called:
        call = Called(module)
        opened[-1].inside.append(call)
        opened.append(call)
        return call

    def leave(call: Called, result: Any) -> None:
        while opened.pop() is not call:
            pass  # a call that failed
        call.again = gives_keys(call.module) or any(inner.again for inner in call.inside)
        if call.again:
            return
        call.over, call.result, call.versions, call.inside = True, result, versions(result), []

    stack.enter_context(watching_calls(modules, enter, leave))


def replayed(forward: Callable[..., Any], results: deque[Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return results.popleft() if results else forward(*args, **kwargs)

    return run


def versions(result: Any) -> tuple[int, ...]:
    """How often each tensor was changed in place; those made in inference mode cannot be, outside of it."""
    return tuple(0 if leaf.is_inference() else leaf._version for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))


def hollow(leaf: Any) -> Any:
    """A tensor of the same shape without the memory; nobody reads it but calls that are themselves replayed."""
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def changed(calls: Sequence[Called]) -> bool:
    """Whether a result is no longer what its module returned."""
    return any(call.versions != versions(call.result) for call in calls)


@torch.no_grad()
def keeping_for(model: nn.Module, run: Callable[[], Any], sites: Sequence[AttentionSite | FeedForward]) -> Keeping:
    """The least that has to be remembered for steps to give what a whole pass gives, at the last of `sites` and in the end, found
    by trying on one batch."""
    if not sites:
        return "nothing"
    expected = states_and_output(run, sites[-1])
    for keeping in ("last", "all"):
        walk = Walk(model, run, keeping)
        for site in sites:
            states, _ = walk.to(site, None)
        try:
            output = compared(walk.end()).to(expected[1].dtype)
        except RuntimeError:  # a result whose memory is gone cannot be changed in place
            continue
        alike = all(found.shape == one.shape and close(found, one) for found, one in zip((states, output), expected))
        if walk.keeping == keeping and alike and not changed(walk._finished):
            return keeping
    return "nothing"


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
