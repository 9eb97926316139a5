"""Applying a plan: compensation, the cut, and pruned models on disk."""

from headprune.surgery.checkpoint import load, save
from headprune.surgery.compensate import Resolved, resolve_outputs
from headprune.surgery.cut import cut
from headprune.surgery.difference import Difference, diff
from headprune.surgery.fold import fold_gates
from headprune.surgery.open_streamed import open_streamed
from headprune.surgery.prune import PruneReport, prune
from headprune.surgery.prune_folder import prune_folder
from headprune.surgery.savings import Savings
from headprune.surgery.search_plan import search_plan

__all__ = [
    "Difference", "PruneReport", "Resolved", "Savings", "cut", "diff", "fold_gates", "load", "open_streamed", "prune",
    "prune_folder", "resolve_outputs", "save", "search_plan",
]  # fmt: skip
