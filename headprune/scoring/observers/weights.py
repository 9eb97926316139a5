"""Observes the size of each head's weights, all projections of the model in one call."""

from __future__ import annotations

from torch import Tensor

from headprune.ops import head_weight_stats
from headprune.scoring.head_weights import ROLES, head_slices, rows_of
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, observes


@observes(Need.WEIGHTS)
class WeightNorms(Observer):
    runs = "nothing"

    def found(self) -> dict[str, dict[str, Tensor]]:
        stats = iter(head_weight_stats(head_slices(self.setting.sites)))
        found = {}
        for site in self.setting.sites:
            own = [next(stats) for _ in ROLES]
            found[site.name] = {
                "weight_l1": rows_of(site, [one.l1 for one in own]),
                "weight_l2": rows_of(site, [one.l2 for one in own]),
                "weight_max": rows_of(site, [one.max for one in own], shares=False),
                "weight_count": rows_of(site, [one.count for one in own]),
            }
        return found
