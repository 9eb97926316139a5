"""Movement of each head's weights while a model is trained, recorded in any training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.models import attention_sites
from headprune.models.site import AttentionSite
from headprune.ops import head_weight_stats
from headprune.scoring.head_weights import ROLES, head_slices, rows_of
from headprune.scoring.observations import Observations, SiteObservations
from headprune.scoring.score import score_observations
from headprune.scoring.scores import HeadScores
from headprune.scoring.site_shape import SiteShape


class MovementRecorder:
    """Adds up -sum w dL/dw of every head over training steps (Sanh et al. 2020): positive where weights move away from zero.

    Call it after `loss.backward()` and before `optimizer.step()`, or let `attach(optimizer)` do so:

        recorder = MovementRecorder(model)
        with_every_step = recorder.attach(optimizer)
        ...  # train
        scores = recorder.scores()

    Weights without a gradient at a step (frozen, or not reached) do not move. Make a new recorder after heads were cut.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sites = attention_sites(model)
        self._slices = head_slices(self._sites)
        check_trained(model, self._sites)
        self._sums = {site.name: torch.zeros(len(ROLES), site.head_map.query_heads, dtype=torch.float64) for site in self._sites}
        self.steps = 0

    def __call__(self, scale: float = 1.0) -> None:
        """Records one step. scale: factor on the gradients, 1 / its scale where a GradScaler has not unscaled them yet."""
        grads = {index: one.weight.grad for index, one in enumerate(self._slices) if one.weight.grad is not None}
        stats = head_weight_stats([self._slices[i] for i in grads], list(grads.values()))
        dots = {index: one.dot for index, one in zip(grads, stats) if one.dot is not None}
        for index, site in enumerate(self._sites):
            first = index * len(ROLES)
            own = [dots.get(i, torch.zeros(self._slices[i].heads)) for i in range(first, first + len(ROLES))]
            self._sums[site.name] -= scale * rows_of(site, own).double()
        self.steps += 1

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Records every step of `optimizer` from now on; `remove()` of what comes back ends it."""
        return optimizer.register_step_pre_hook(lambda *_: self())

    def observations(self) -> Observations:
        """What was recorded so far, as Need.MOVEMENT. Raises InvalidInput before the first step."""
        if not self.steps:
            raise InvalidInput("no training step was recorded; call the recorder after each loss.backward().")
        return Observations(
            {
                site.name: SiteObservations(site.name, SiteShape.of(site), movement=self._sums[site.name].float())
                for site in self._sites
            }
        )

    def scores(self) -> HeadScores:
        """Of the steps so far, by the criterion "movement"; for `hp.plan`."""
        return score_observations(self.observations(), "movement")

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"steps": self.steps, **{name: sums.clone() for name, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InvalidInput where the state is of another model."""
        shapes = {name: tuple(sums.shape) for name, sums in self._sums.items()}
        found = {name: tuple(value.shape) for name, value in state.items() if name != "steps"}
        if found != shapes:
            raise InvalidInput("this state was recorded on a model with other attentions or heads.")
        self.steps = int(state["steps"])
        self._sums = {name: state[name].clone().to("cpu", torch.float64) for name in shapes}


def check_trained(model: nn.Module, sites: Iterable[AttentionSite]) -> None:
    """UnsupportedModel where an attention's weights are not those that training moves (XLNet's, which are of another shape)."""
    trained = {id(parameter) for parameter in model.parameters()}
    for site in sites:
        if id(site.output.module.weight) not in trained:
            raise UnsupportedModel(
                f"{site.name} ({type(site.module).__name__}) has no linear layers whose movement could be recorded; score it by "
                "taylor_weight or fisher."
            )
