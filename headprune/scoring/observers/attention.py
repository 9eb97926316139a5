"""Observes what the fused forward pass tells about each head's attention: six numbers per sequence and head."""

from __future__ import annotations

from typing import Any

import torch
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
        spoilt = nan_where_not_finite(call)
        self._rows.add(site.name, **{field: getattr(stats, field) + spoilt for field in FIELDS})

    def found(self) -> dict[str, dict[str, Tensor]]:
        return self._rows.found()


def nan_where_not_finite(call: AttentionCall) -> Tensor:
    """fp32 [batch, query_heads]: 0, or NaN where a query that counts has NaN or infinity in it (overflow in low precision). Kernels
    may leave such rows out, and a head that nothing is told of would pass for a focused one."""
    rows = 0 * call.query.sum(dim=3, dtype=torch.float32)
    return (rows if call.query_mask is None else rows.masked_fill(~call.query_mask[:, None], 0.0)).sum(dim=2)
