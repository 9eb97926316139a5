"""Budgets, allocation across layers, and the plan."""

from headprune.planning.allocation import allocation
from headprune.planning.budget import Budget
from headprune.planning.planner import plan
from headprune.planning.pruning_plan import PruningPlan

__all__ = ["Budget", "PruningPlan", "allocation", "plan"]
