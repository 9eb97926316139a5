"""Heads that copy from the context, by what they attend to on generated sequences."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

COST = "two forward passes on generated tokens, no data; decoders"


@criterion("induction", needs={Need.PROBE}, source="Olsson et al. 2022, In-context Learning and Induction Heads", cost=COST)
def induction(observed: SiteObservations) -> Tensor:
    """Mean attention, in a random sequence's second occurrence, on the token that followed the first time."""
    return observed.probe_induction


@criterion("previous_token", needs={Need.PROBE}, source="Olsson et al. 2022, In-context Learning and Induction Heads", cost=COST)
def previous_token(observed: SiteObservations) -> Tensor:
    """Mean attention on the token before, in random sequences."""
    return observed.probe_previous


@criterion(
    "retrieval",
    needs={Need.PROBE},
    source="after Wu et al. 2024, Retrieval Head; Xiao et al. 2024, DuoAttention (generated needles)",
    cost=COST,
)
def retrieval(observed: SiteObservations) -> Tensor:
    """Share of a needle's tokens that the head attends to most when they are to be copied out of a random haystack."""
    return observed.probe_retrieval
