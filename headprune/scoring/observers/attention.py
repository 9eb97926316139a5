"""Observes what the fused forward pass tells about each head's attention: six numbers per sequence and head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headprune.models.site import AttentionSite
from headprune.ops.call import AttentionCall
from headprune.ops.stats import HeadStats
from headprune.scoring.observations import Need
from headprune.scoring.observer import Setting, observes
from headprune.scoring.observers.sample_rows import SampleRows
from headprune.scoring.observers.watched_attention import WatchedAttention

FIELDS = ("entropy", "max_prob", "max_logit", "first_mass", "distance", "output_norm")


@observes(Need.ATTENTION)
class AttentionStatistics(WatchedAttention):
    """One row per sequence of each batch, and per call where a site runs several times in one pass (ALBERT)."""

    stats = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._rows = SampleRows(setting, FIELDS)

    def see(self, site: AttentionSite, batch: Any, call: AttentionCall, stats: HeadStats | None) -> None:
        self._rows.add(site.name, **{field: getattr(stats, field) for field in FIELDS})

    def found(self) -> dict[str, dict[str, Tensor]]:
        return self._rows.found()
