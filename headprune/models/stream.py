"""Where the residual stream runs past each attention, found by watching one forward pass.

An output projection's result y is added to a residual stream s; where s enters the model is a matter of the family (BERT
adds the attention's own input, a pre-norm block the block's). It is recognised by value: behind the projection some
module receives exactly s + y, where s is what the attention or the block around it received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models.site import AttentionSite


@torch.no_grad()
def residual_streams(model: nn.Module, sites: Sequence[AttentionSite], run: Callable[[], Any]) -> dict[str, nn.Module]:
    """Site name -> the module whose first input is the stream that the site's output is added to.

    run: one forward pass of `model`, in eval mode. Sites whose sum is never formed as such (a gated or scaled residual, a
    norm before the sum, attention and feed-forward summed at once) are left out.
    """
    watched = [Watch(site, model) for site in sites]
    with ExitStack() as stack:
        for module in model.modules():
            handle = module.register_forward_pre_hook(entering(watched), with_kwargs=True)
            stack.callback(handle.remove)
        for watch in watched:
            stack.callback(watch.site.output.module.register_forward_hook(watch.projected).remove)
            stack.callback(watch.around[-1].register_forward_hook(watch.left).remove)
        run()
    return {watch.site.name: watch.stream for watch in watched if watch.stream is not None}


class Watch:
    """One site: the tensors that its candidates received, until the sum is met or the block around it returns."""

    def __init__(self, site: AttentionSite, model: nn.Module) -> None:
        self.site = site
        self.around = [site.module, model.get_submodule(site.name.rpartition(".")[0])]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.output: Tensor | None = None
        self.stream: nn.Module | None = None

    def entered(self, module: nn.Module, received: Tensor) -> None:
        self.compare(received)
        if module in self.around:
            self.inputs[module] = received

    def projected(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.output = first_tensor(output if isinstance(output, tuple) else (output,))

    def left(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.compare(first_tensor(output if isinstance(output, tuple) else (output,)))
        self.output = None
        self.inputs.clear()

    def compare(self, tensor: Tensor | None) -> None:
        if self.output is None or tensor is None or tensor.shape != self.output.shape:
            return
        for module in self.around:
            entered = self.inputs.get(module)
            if entered is not None and entered.shape == tensor.shape and torch.equal(tensor, entered + self.output):
                self.stream, self.output = module, None
                return


def entering(watched: Sequence[Watch]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        received = first_tensor((*args, *kwargs.values()))
        if received is not None:
            for watch in watched:
                watch.entered(module, received)

    return hook


def first_tensor(values: Sequence[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)
