"""Observes the gate gradients of every head and sample, with all weights frozen.

With a gate on head h, dL/dgate_h of one sample is the sum over its tokens of <O_h, dL/dO_h> (Michel, Levy, Neubig 2019,
eq. 4): all that is needed is the output projection's input and its gradient, so no gate is multiplied in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.gating import output_input_hook
from headprune.models.site import AttentionSite


class _Tap(torch.autograd.Function):
    """Identity whose backward hands (input, gradient) to `seen`. `anchor` starts the graph at the first frozen layer."""

    @staticmethod
    def forward(ctx, inputs: Tensor, anchor: Tensor, seen) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.seen = seen
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inputs,) = ctx.saved_tensors
        ctx.seen(inputs, grad)
        return (grad if ctx.needs_input_grad[0] else None), None, None


class GateGradients:
    """Collects, per site, one row of gate gradients per sample: call `backward(loss)` after each forward inside `watching()`."""

    def __init__(self, sites: list[AttentionSite]) -> None:
        self.rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        self._sites = sites
        self._batch: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Freezes the model, in eval mode, and taps every site; all is as before afterwards."""
        training, frozen = model.training, [p for p in model.parameters() if p.requires_grad]
        with ExitStack() as stack:
            for site in self._sites:
                stack.enter_context(output_input_hook(site, self._tap(site)))
            try:
                model.eval()
                for parameter in frozen:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(True)
                model.train(training)

    def backward(self, loss: Tensor) -> None:
        """Reads the gate gradients of one batch. loss: per-sample losses [n], or their mean (a scalar), which is scaled up
        by the number of rows that the sites saw. Raises InvalidInput where the loss is not finite or reaches no site."""
        if not torch.isfinite(loss).all():
            raise InvalidInput(
                "the loss is NaN or infinite on a calibration batch; look for empty labels or overflow in low precision."
            )
        if not loss.requires_grad:
            raise InvalidInput("the loss does not depend on any attention head; is it computed under torch.no_grad()?")
        self._batch.clear()
        loss.sum().backward()
        rows = max((grads.shape[0] for grads in self._batch.values()), default=0)
        for site in self._sites:
            if site.name not in self._batch:
                raise InvalidInput(f"{site.name} was not reached by the loss: no gradient came through it.")
            grads = self._batch[site.name]
            self.rows[site.name].append((grads * rows if loss.dim() == 0 else grads).cpu())
        self._batch.clear()

    def _tap(self, site: AttentionSite):
        owner, heads = site.head_of_column(), site.head_map.query_heads

        def seen(inputs: Tensor, grad: Tensor) -> None:
            if inputs.dim() != 3:
                raise InvalidInput(f"{site.output.name} receives {list(inputs.shape)}; expected [batch, tokens, features].")
            columns = (inputs.float() * grad.float()).sum(dim=1)
            found = columns.new_zeros(columns.shape[0], heads).index_add_(1, owner.to(columns.device), columns)
            earlier = self._batch.get(site.name)
            self._batch[site.name] = found if earlier is None else earlier + found

        def tap(inputs: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            return _Tap.apply(inputs, inputs.new_zeros((), requires_grad=True), seen)

        return tap
