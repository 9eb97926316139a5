"""Observes how unlike the attention of two heads of a layer is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headprune.models.site import AttentionSite
from headprune.ops.call import AttentionCall
from headprune.ops.rows import row_blocks
from headprune.ops.stats import HeadStats
from headprune.scoring.observations import Need
from headprune.scoring.observer import Setting, observes
from headprune.scoring.observers.watched_attention import WatchedAttention


@observes(Need.ATTENTION_DISTANCE)
class AttentionDistances(WatchedAttention):
    """Sums of Jensen-Shannon divergences over the rows that count (Clark et al. 2019, sec. 6)."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        heads = {site.name: site.head_map.query_heads for site in setting.sites}
        self._sums = {name: torch.zeros(count, count, dtype=torch.float64, device="cpu") for name, count in heads.items()}
        self._counts = {name: torch.zeros((), dtype=torch.float64, device="cpu") for name in heads}

    def see(self, site: AttentionSite, batch: Any, call: AttentionCall, stats: HeadStats | None) -> None:
        counted = self.counted(site, batch, call.query)
        for rows in row_blocks(call):
            used = rows.probs.any(dim=2).any(dim=0)
            if counted is not None:
                used = used & counted[rows.sample, rows.queries]
            self._sums[site.name] += divergences(rows.probs[:, used]).cpu()
            self._counts[site.name] += int(used.sum())

    def found(self) -> dict[str, dict[str, Tensor]]:
        return {
            site.name: {"distance_sum": self._sums[site.name].clone(), "distance_rows": self._counts[site.name].clone()}
            for site in self.setting.sites
        }


def divergences(probs: Tensor) -> Tensor:
    """fp64 [heads, heads]: Jensen-Shannon divergence in nats, H((p + q) / 2) - (H(p) + H(q)) / 2, of two heads' distributions
    summed over rows. probs: [heads, rows, keys]."""
    entropy = torch.special.entr(probs).sum(dim=2)
    found = torch.zeros(len(probs), len(probs), dtype=torch.float64, device=probs.device)
    for head in range(len(probs) - 1):
        mixed = torch.special.entr((probs[head] + probs[head + 1 :]) / 2).sum(dim=2)
        found[head, head + 1 :] = (mixed - (entropy[head] + entropy[head + 1 :]) / 2).clamp(min=0).double().sum(dim=1)
    return found + found.T
