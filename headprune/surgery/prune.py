"""Applies a plan to a model: checks, compensation, then the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.models.batches import by_name, several
from headprune.nn.replace import on_own_attention
from headprune.planning.pruning_plan import PruningPlan, check_plan
from headprune.surgery.compensate import Resolved, refuse_uncompensated, resolve_outputs
from headprune.surgery.cut import carry_out, checked_cut
from headprune.surgery.normal_equations import get_solver
from headprune.surgery.savings import Savings


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did, or (done=False, a dry run) would do. savings: parameters, FLOPs and cache, before and after. resolved: per
    site what compensation did, empty without calibration; the report iterates over it."""

    savings: Savings
    resolved: tuple[Resolved, ...]
    done: bool

    def __iter__(self) -> Iterator[Resolved]:
        return iter(self.resolved)

    def __len__(self) -> int:
        return len(self.resolved)

    def __str__(self) -> str:
        return f"{'pruned' if self.done else 'dry run, nothing was changed'}\n{self.savings}"


@on_own_attention
def prune(
    model: nn.Module,
    plan: PruningPlan,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    compensation: str = "least_squares",
    feed_forward: bool = False,
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
    verify: bool = True,
) -> PruneReport:
    """Removes the heads that `plan` lets go from `model`, in place.

    With `calibration` batches every output projection is first re-solved so that its layer gives what it gave before
    (`headprune.surgery.compensate`). forward, token_mask, progress: as there.

    Args:
        compensation: "least_squares", or, to compare with, "mask_tuning" (Kwon et al. 2022) or "bias" (FLAP).
        feed_forward: re-solve the ends of the feed-forwards as well (`resolve_outputs`); better, for more time and memory.
        dry_run: check all and say what would go and what that saves; nothing is changed.
        verify: try the cut of each attention on a small input first and compare it with gating (`headprune.surgery.cut`): a
            few random tokens, pixels or sounds, and the first calibration batch for attentions that those do not reach.

    Raises InvalidPlan where the plan is for another model, UnsupportedModel where an attention cannot be cut exactly,
    InvalidInput where calibration is empty. The model is untouched then.
    """
    check_plan(plan, model)
    check_arguments(prune, locals())
    get_solver(compensation)
    refuse_uncompensated(calibration, feed_forward)
    batches = None if calibration is None else list(several(calibration, "calibration"))
    of_batch = None
    if batches:
        of_batch = lambda model: (forward or partial(by_name, instead="forward"))(model, batches[0])  # noqa: E731
    checked = checked_cut(model, plan, verify=verify, otherwise=of_batch)
    savings = Savings.of(model, checked.sites, checked.kept)
    if dry_run:
        return PruneReport(savings, (), done=False)
    resolved: list[Resolved] = []
    if batches is not None:
        sites = list(checked.sites.values())
        resolved = resolve_outputs(
            model, sites, plan, batches, forward=forward, token_mask=token_mask, method=compensation, feed_forward=feed_forward,
            progress=progress,
        )  # fmt: skip
    carry_out(model, checked)
    return PruneReport(savings, tuple(resolved), done=True)
