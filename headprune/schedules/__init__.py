"""Loops around score -> plan -> prune -> recover, each resumable at any step."""

from headprune.schedules.iterative import iterative, one_shot
from headprune.schedules.recovering import RecoverySettings, Round
from headprune.schedules.result import ScheduleResult, Step
from headprune.schedules.schedule import ScheduleFailed, get_schedule, options_of, schedule, schedules
from headprune.schedules.spacing import spacing

__all__ = [
    "RecoverySettings",
    "Round",
    "ScheduleFailed",
    "ScheduleResult",
    "Step",
    "get_schedule",
    "iterative",
    "one_shot",
    "options_of",
    "schedule",
    "schedules",
    "spacing",
]
