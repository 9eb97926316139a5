"""What is kept sample by sample: one row per sample and site, on the device where it was measured until it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headprune.scoring.observer import Setting


class SampleRows:
    """Field -> one row [query_heads] per sequence that ran through a site, for all sites.

    Nothing is copied to the host before `found`: the device would wait for every copy.
    """

    def __init__(self, setting: Setting, fields: tuple[str, ...]) -> None:
        self._heads = {site.name: site.head_map.query_heads for site in setting.sites}
        self._rows: dict[str, dict[str, list[Tensor]]] = {name: {field: [] for field in fields} for name in self._heads}

    def add(self, site: str, **rows: Tensor) -> None:
        """rows: [sequences, query_heads] for each field."""
        for field, values in rows.items():
            self._rows[site][field].append(values.detach().float())

    def found(self) -> dict[str, dict[str, Tensor]]:
        """Site -> field -> [sequences, query_heads], fp32, on the CPU."""
        return {
            name: {field: joined(values, self._heads[name]) for field, values in fields.items()}
            for name, fields in self._rows.items()
        }


def joined(rows: Sequence[Tensor], heads: int) -> Tensor:
    """[all rows, heads] on the CPU; rows of one device are copied together."""
    if len({values.device for values in rows}) == 1:
        return torch.cat(list(rows)).cpu()
    return torch.cat([torch.zeros(0, heads), *(values.cpu() for values in rows)])
