"""Observations (what to measure, how it is gathered) and criteria (pure functions of them)."""

# Register what comes with headprune. First, because the function `criteria` takes the subpackage's name here.
import headprune.scoring.criteria
import headprune.scoring.observers  # noqa: F401
from headprune.scoring.agreement import Agreement
from headprune.scoring.block_fisher import block_fisher
from headprune.scoring.causal_losses import causal_losses
from headprune.scoring.criterion import Criterion, criteria, criterion, get_criterion
from headprune.scoring.movement import MovementRecorder
from headprune.scoring.observations import Need, Observations, SiteObservations
from headprune.scoring.observe import observe
from headprune.scoring.portraits import HeadPortrait, Portraits, portrait_needs, portraits
from headprune.scoring.score import check_normalization, score, score_observations
from headprune.scoring.scores import HeadScores
from headprune.scoring.site_shape import SiteShape
from headprune.scoring.stability import Stability, ranking_stability, unsettled_heads

__all__ = [
    "Agreement",
    "Criterion",
    "HeadPortrait",
    "HeadScores",
    "MovementRecorder",
    "Need",
    "Observations",
    "Portraits",
    "SiteObservations",
    "SiteShape",
    "Stability",
    "block_fisher",
    "causal_losses",
    "check_normalization",
    "criteria",
    "criterion",
    "get_criterion",
    "observe",
    "portrait_needs",
    "portraits",
    "ranking_stability",
    "score",
    "score_observations",
    "unsettled_heads",
]
