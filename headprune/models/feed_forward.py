"""The linear layer that ends the feed-forward behind each attention, found by watching one forward pass.

Like the stream of an attention (headprune.models.stream) it is recognised by value: behind the attention, in the same block, a
linear layer gives y, and then some module receives, or the block returns, exactly s + y, where s is what a module behind the
attention received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models.site import AttentionSite, is_conv1d
from headprune.models.stream import first_tensor


@dataclass(frozen=True)
class FeedForward:
    """name, module: the linear layer. stream: the module whose first input is the stream that its output is added to."""

    name: str
    module: nn.Module
    stream: nn.Module

    @property
    def output(self) -> FeedForward:
        """Itself: what is to be re-solved, as the output projection of an attention is."""
        return self

    @property
    def outputs(self) -> tuple[FeedForward, ...]:
        return (self,)


@torch.no_grad()
def feed_forwards(model: nn.Module, sites: Sequence[AttentionSite], run: Callable[[], Any]) -> dict[str, FeedForward]:
    """Site name -> the end of the feed-forward behind it; sites behind which none is seen (a mixture of experts, an output that is
    scaled or normed before the sum) are left out, and those behind which another attention comes first (in a decoder with cross
    attention). run: one forward pass of `model`, in eval mode."""
    names = {module: name for name, module in model.named_modules()}
    ends = {site.output.module for site in sites}
    watched = [Watch(site, block_around(site, model, sites), ends - {site.output.module}) for site in sites]
    with ExitStack() as stack:
        for watch in watched:
            for module in watch.block.modules():
                stack.callback(module.register_forward_pre_hook(watch.entered, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(watch.left).remove)
        run()
    found = {watch.site.name: watch.found for watch in watched if watch.found is not None}
    return {site: FeedForward(names[linear], linear, stream) for site, (linear, stream) in found.items()}


class Watch:
    """One block: what its modules receive behind the attention, and what its last linear layer gave."""

    def __init__(self, site: AttentionSite, block: nn.Module, others: Set[nn.Module]) -> None:
        """others: the output projections of other attentions."""
        self.site, self.block, self.others = site, block, others
        self.streams: list[tuple[nn.Module, Tensor]] = []
        self.last: tuple[nn.Module, Tensor] | None = None
        self.found: tuple[nn.Module, nn.Module] | None = None
        self.behind = False

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        received = first_tensor((*args, *kwargs.values()))
        if not self.behind or received is None:
            return
        self.compare(received)
        self.streams.append((module, received))

    def left(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        returned = first_tensor(output if isinstance(output, tuple) else (output,))
        if module is self.site.output.module:
            self.behind = True
        elif module in self.others:
            self.leave()
        elif self.behind and is_linear(module) and returned is not None:
            self.last = (module, returned)
        elif module is self.block:
            self.compare(returned)
            self.leave()

    def leave(self) -> None:
        self.behind, self.last = False, None
        self.streams.clear()

    def compare(self, tensor: Tensor | None) -> None:
        if self.last is None or tensor is None or self.found is not None:
            return
        linear, output = self.last
        for module, stream in self.streams:
            if stream.shape == tensor.shape == output.shape and module is not linear and torch.equal(tensor, stream + output):
                self.found = (linear, module)
                return


def block_around(site: AttentionSite, model: nn.Module, sites: Sequence[AttentionSite]) -> nn.Module:
    """The module around an attention; where that holds nothing else that multiplies (T5), the layer around it."""
    path = site.name.rpartition(".")[0]
    block = model.get_submodule(path)
    inside = set(site.module.modules())
    while path and not any(is_linear(module) for module in block.modules() if module not in inside):
        path = path.rpartition(".")[0]
        wider = model.get_submodule(path)
        if isinstance(wider, nn.ModuleList):
            continue
        if sum(other.kind == "self" and other.name.startswith(f"{path}.") for other in sites) > 1:
            break
        block = wider
    return block


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)
