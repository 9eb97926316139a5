"""Recovery: fine-tuning, distillation from the dense model, rewinding, adapters."""

from headprune.recovery.distillation import Comparison, Distillation, distillation_loss, distillation_term
from headprune.recovery.methods import recovery_method
from headprune.recovery.objective import Objective, loss
from headprune.recovery.quantise import Quantised, QuantisedQuality, compare_quantised, quantise
from headprune.recovery.recover import recover
from headprune.recovery.result import Recovery
from headprune.recovery.rewind import RateRewind, rewind_weights
from headprune.recovery.rounded_weights import rounded_weights
from headprune.recovery.stored_logits import store_logits

__all__ = [
    "Comparison",
    "Distillation",
    "Objective",
    "Quantised",
    "QuantisedQuality",
    "RateRewind",
    "Recovery",
    "compare_quantised",
    "distillation_loss",
    "distillation_term",
    "loss",
    "quantise",
    "recover",
    "recovery_method",
    "rewind_weights",
    "rounded_weights",
    "store_logits",
]
