"""Gates on heads that are trained with the model."""

from headprune.schedules.gates import hard_concrete, movement, proximal, subset  # noqa: F401 (they register their methods)
from headprune.schedules.gates.gate_method import GateMethod, Moment, gate_method, gate_methods, get_gate_method
from headprune.schedules.gates.layout import GateLayout

__all__ = ["GateLayout", "GateMethod", "Moment", "gate_method", "gate_methods", "get_gate_method"]
