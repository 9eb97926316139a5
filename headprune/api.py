"""The public names. `headprune` gives them as its own, and imports this file when one of them is asked for."""

from headprune import compat, nn, ops, recovery, schedules
from headprune.comparison import MethodComparison, compare_methods
from headprune.errors import CorruptCheckpoint, HeadpruneError, InfeasibleBudget, InvalidInput, InvalidPlan, UnsupportedModel
from headprune.evaluation import Estimate, Evaluation, estimate, evaluate
from headprune.head_map import HeadMap
from headprune.models import AttentionSite, attention_sites, gated, register_adapter
from headprune.planning import Budget, PruningPlan, plan
from headprune.recovery import Distillation, Recovery, recover
from headprune.report.web_page import report
from headprune.schedules import RecoverySettings, ScheduleFailed, ScheduleResult, iterative, lottery_ticket, one_shot, pruning_aware
from headprune.scoring import (
    HeadScores,
    Need,
    Observations,
    causal_losses,
    criteria,
    criterion,
    observe,
    portraits,
    ranking_stability,
    score,
    score_observations,
)
from headprune.surgery import cut, diff, load, open_streamed, prune, prune_folder, save, search_plan
from headprune.version import __version__

__all__ = [
    "AttentionSite",
    "Budget",
    "CorruptCheckpoint",
    "Distillation",
    "Estimate",
    "Evaluation",
    "HeadMap",
    "HeadScores",
    "HeadpruneError",
    "InfeasibleBudget",
    "InvalidInput",
    "InvalidPlan",
    "MethodComparison",
    "Need",
    "Observations",
    "PruningPlan",
    "Recovery",
    "RecoverySettings",
    "ScheduleFailed",
    "ScheduleResult",
    "UnsupportedModel",
    "__version__",
    "attention_sites",
    "causal_losses",
    "compare_methods",
    "compat",
    "criteria",
    "criterion",
    "cut",
    "diff",
    "estimate",
    "evaluate",
    "gated",
    "iterative",
    "load",
    "lottery_ticket",
    "nn",
    "observe",
    "one_shot",
    "open_streamed",
    "ops",
    "plan",
    "portraits",
    "prune",
    "prune_folder",
    "pruning_aware",
    "ranking_stability",
    "recover",
    "recovery",
    "register_adapter",
    "report",
    "save",
    "schedules",
    "score",
    "score_observations",
    "search_plan",
]
