"""Applying a plan: compensation, the cut, and pruned models on disk."""

from headprune.surgery.checkpoint import load, save
from headprune.surgery.compensate import Resolved, resolve_outputs
from headprune.surgery.cut import cut
from headprune.surgery.fold import fold_gates
from headprune.surgery.prune import PruneReport, prune
from headprune.surgery.savings import Savings

__all__ = ["PruneReport", "Resolved", "Savings", "cut", "fold_gates", "load", "prune", "resolve_outputs", "save"]
