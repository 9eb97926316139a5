"""One pass over the data that measures all that is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput, unknown_name
from headprune.models import attention_sites
from headprune.scoring.gate_gradient import GateGradients
from headprune.scoring.observations import Need, Observations, SiteObservations, SiteShape
from headprune.scoring.weights import weight_statistics

LossFunction = Callable[[nn.Module, Any], Tensor]


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Need | str],
    *,
    loss_fn: LossFunction | None = None,
    progress: Callable[[int], None] | None = None,
) -> Observations:
    """Measures what `needs` names, in one pass over `batches`.

    Args:
        batches: dicts for `model(**batch)` whose output has a `loss`, or anything that `loss_fn` understands. Not read
            where only weights are needed.
        needs: members of Need, or their values ("weights", "gate_gradient").
        loss_fn: `loss_fn(model, batch)` gives per-sample losses [n] (exact per-sample gradients) or their mean.
        progress: called with the number of batches done.

    Raises InvalidInput where `batches` is empty, a loss is missing or not finite, or a site is never reached.
    """
    wanted = {as_need(need) for need in needs}
    sites = attention_sites(model)
    found: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}
    if Need.WEIGHTS in wanted:
        for site in sites:
            found[site.name].update(weight_statistics(site))
    if Need.GATE_GRADIENT in wanted:
        gradients = GateGradients(sites)
        with gradients.watching(model), torch.enable_grad():
            done = 0
            for batch in batches:
                gradients.backward(loss_fn(model, batch) if loss_fn else model_loss(model, batch))
                done += 1
                if progress:
                    progress(done)
        if not done:
            raise InvalidInput("the calibration set is empty; a gradient criterion needs at least one batch.")
        for name, rows in gradients.rows.items():
            found[name]["gate_gradient"] = torch.cat(rows)
    return Observations({site.name: SiteObservations(site.name, SiteShape.of(site), **found[site.name]) for site in sites})


def as_need(need: Need | str) -> Need:
    if isinstance(need, Need):
        return need
    try:
        return Need(need)
    except ValueError:
        raise unknown_name("observation", need, [known.value for known in Need]) from None


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """`output.loss` of a transformers model."""
    if not isinstance(batch, dict):
        raise InvalidInput(f"a batch is a {type(batch).__name__}; expected a dict for model(**batch), or give loss_fn.")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise InvalidInput(f"{type(model).__name__} returned no loss: put labels into the batches, or give loss_fn.")
    return loss
