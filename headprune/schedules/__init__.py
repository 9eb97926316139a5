"""Loops around score -> plan -> prune -> recover, each resumable at any step."""

from headprune.schedules.gates import gate_method, gate_methods
from headprune.schedules.iterative import iterative, one_shot
from headprune.schedules.lottery_ticket import lottery_ticket
from headprune.schedules.pruning_aware import pruning_aware
from headprune.schedules.recovering import RecoverySettings, Round
from headprune.schedules.result import ScheduleResult, Step
from headprune.schedules.schedule import ScheduleFailed, check_schedule, get_schedule, recipe_options, schedule, schedules
from headprune.schedules.spacing import spacing

__all__ = [
    "RecoverySettings",
    "Round",
    "ScheduleFailed",
    "ScheduleResult",
    "Step",
    "check_schedule",
    "gate_method",
    "gate_methods",
    "get_schedule",
    "iterative",
    "lottery_ticket",
    "one_shot",
    "pruning_aware",
    "recipe_options",
    "schedule",
    "schedules",
    "spacing",
]
