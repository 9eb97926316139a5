"""Movement is recorded in a training loop, not in a pass over calibration data."""

from __future__ import annotations

from headprune.errors import InvalidInput
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes


@observes(Need.MOVEMENT)
class Movement(Observer):
    def __init__(self, setting: Setting) -> None:
        raise InvalidInput(
            "movement adds up over training steps and cannot be observed on calibration data: record it in the training loop "
            "with headprune.scoring.MovementRecorder(model) and take its scores()."
        )
