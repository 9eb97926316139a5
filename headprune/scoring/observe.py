"""One pass over the data that measures all that is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput, unknown_name
from headprune.models import attention_sites
from headprune.models.tokens import TokenMask, attention_mask_of
from headprune.scoring.gate_gradient import GateGradients
from headprune.scoring.gram import Grams
from headprune.scoring.observations import Need, Observations, SiteObservations, SiteShape
from headprune.scoring.weights import weight_statistics

LossFunction = Callable[[nn.Module, Any], Tensor]


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Need | str],
    *,
    loss_fn: LossFunction | None = None,
    token_mask: TokenMask | None = None,
    progress: Callable[[int], None] | None = None,
) -> Observations:
    """Measures what `needs` names, in one pass over `batches`.

    Args:
        batches: dicts for `model(**batch)` whose output has a `loss`, or anything that `loss_fn` understands. Not read
            where only weights are needed.
        needs: members of Need, or their values ("weights", "gate_gradient", "gram").
        loss_fn: `loss_fn(model, batch)` gives per-sample losses [n] (exact per-sample gradients) or their mean.
        token_mask: `token_mask(batch)` gives bool [batch, tokens] of the tokens that count in Gram matrices, or None; default
            the batch's "attention_mask".
        progress: called with the number of batches done.

    Raises InvalidInput where `batches` is empty, a loss is missing or not finite, or a site is never reached.
    """
    wanted = {as_need(need) for need in needs}
    sites = attention_sites(model)
    found: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}
    if Need.WEIGHTS in wanted:
        for site in sites:
            found[site.name].update(weight_statistics(site))
    if wanted & {Need.GATE_GRADIENT, Need.GRAM}:
        gradients = GateGradients(sites) if Need.GATE_GRADIENT in wanted else None
        grams = Grams(sites) if Need.GRAM in wanted else None
        run_batches(model, batches, gradients, grams, loss_fn, token_mask or attention_mask_of, progress)
        for name, rows in gradients.rows.items() if gradients else ():
            found[name]["gate_gradient"] = torch.cat(rows)
        for name, sums in grams.found().items() if grams else ():
            found[name].update(sums)
    return Observations({site.name: SiteObservations(site.name, SiteShape.of(site), **found[site.name]) for site in sites})


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    gradients: GateGradients | None,
    grams: Grams | None,
    loss_fn: LossFunction | None,
    token_mask: TokenMask,
    progress: Callable[[int], None] | None,
) -> None:
    """One pass, in eval mode: forward alone for Gram matrices, forward and backward for gate gradients."""
    done, training = 0, model.training
    model.eval()
    try:
        with gradients.watching(model) if gradients else nullcontext(), torch.set_grad_enabled(gradients is not None):
            for batch in batches:
                with grams.watching(token_mask(batch)) if grams else nullcontext():
                    loss = loss_of(model, batch, loss_fn, needed=gradients is not None)
                if gradients:
                    gradients.backward(loss)
                done += 1
                if progress:
                    progress(done)
    finally:
        model.train(training)
    if not done:
        raise InvalidInput("the calibration set is empty; a criterion that runs the model needs at least one batch.")


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFunction | None, needed: bool) -> Tensor | None:
    """The loss of `batch`; where it is not `needed`, a forward pass of the model is enough."""
    if loss_fn:
        return loss_fn(model, batch)
    if needed or not isinstance(batch, dict):
        return model_loss(model, batch)
    model(**batch)
    return None


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
