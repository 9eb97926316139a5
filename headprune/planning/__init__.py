"""Budgets, allocation across layers, searches, and the plan."""

from headprune.planning import optimal  # noqa: F401 (registers its allocation)
from headprune.planning.allocation import allocation
from headprune.planning.budget import Budget
from headprune.planning.diversity import diverse
from headprune.planning.engine import Engine, engines, register_engine
from headprune.planning.evolution import Evolution, evolve, masked_fitness
from headprune.planning.latency_table import LatencyTable
from headprune.planning.layer_weights import LayerSearch, search_layer_weights
from headprune.planning.mask_search import fisher_mask_search
from headprune.planning.planner import plan
from headprune.planning.pruning_plan import PruningPlan
from headprune.planning.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Budget",
    "Engine",
    "Evolution",
    "LatencyTable",
    "LayerSearch",
    "PruningPlan",
    "Sensitivity",
    "allocation",
    "diverse",
    "engines",
    "evolve",
    "fisher_mask_search",
    "masked_fitness",
    "plan",
    "register_engine",
    "search_layer_weights",
    "sensitivity",
]
