"""Observations (what to measure, how it is gathered) and criteria (pure functions of them)."""

# Registers the criteria that come with headprune. First, because the function `criteria` takes the subpackage's name here.
import headprune.scoring.criteria  # noqa: F401
from headprune.scoring.criterion import Criterion, criteria, criterion, get_criterion
from headprune.scoring.observations import Need, Observations, SiteObservations, SiteShape
from headprune.scoring.observe import observe
from headprune.scoring.scores import HeadScores, score, score_observations

__all__ = [
    "Criterion",
    "HeadScores",
    "Need",
    "Observations",
    "SiteObservations",
    "SiteShape",
    "criteria",
    "criterion",
    "get_criterion",
    "observe",
    "score",
    "score_observations",
]
