"""Applies a plan to a model: compensation, then the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from headprune.models import attention_sites
from headprune.nn.replace import on_own_attention
from headprune.planning.pruning_plan import PruningPlan
from headprune.surgery.compensate import Resolved, resolve_outputs
from headprune.surgery.cut import cut


@on_own_attention
def prune(
    model: nn.Module,
    plan: PruningPlan,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resolved]:
    """Removes the heads that `plan` lets go from `model`, in place.

    With `calibration` batches every output projection is first re-solved so that its layer gives what it gave before
    (`headprune.surgery.compensate`); what that did per site is returned. forward, token_mask, progress: as there.

    Raises InvalidPlan where the plan is for another model or empties a site; InvalidInput where calibration is empty. The
    model is untouched then.
    """
    plan.check_fits(model)
    sites = attention_sites(model)
    resolved: list[Resolved] = []
    if calibration is not None:
        resolved = resolve_outputs(model, sites, plan, calibration, forward=forward, token_mask=token_mask, progress=progress)
    cut(model, plan)
    return resolved
