"""Observes where each head's attention goes: to the token before, to itself, nearby, to special tokens, to punctuation.

Plain PyTorch over a few rows of the attention matrix at a time: slower than the fused statistics, so only where asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headprune.models.site import AttentionSite
from headprune.models.token_kinds import input_ids_of
from headprune.ops.call import AttentionCall
from headprune.ops.rows import Rows, row_blocks
from headprune.ops.stats import HeadStats
from headprune.scoring.observations import Need
from headprune.scoring.observer import Setting, observes
from headprune.scoring.observers.sample_rows import SampleRows
from headprune.scoring.observers.watched_attention import WatchedAttention

NEAR = 4  # tokens on either side that count as local
OF_POSITIONS = ("previous_mass", "self_mass", "local_mass", "evenness")
OF_KINDS = ("special_mass", "punctuation_mass", "ordinary_max_prob")


@observes(Need.ATTENTION_PATTERN)
class AttentionPattern(WatchedAttention):
    """Means over the rows that count, one row of means per sequence. What concerns kinds of tokens is observed where
    token_kinds are known, and NaN where the batch's "input_ids" are not the keys (vision, cross attention)."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._fields = OF_POSITIONS + (OF_KINDS if setting.token_kinds else ())
        self._rows = SampleRows(setting, self._fields)

    def see(self, site: AttentionSite, batch: Any, call: AttentionCall, stats: HeadStats | None) -> None:
        counted, kinds = self.counted(site, batch, call.query), self._kinds_of_keys(batch, call)
        sums = torch.zeros(len(self._fields), call.batch, call.query_heads, dtype=torch.float64, device="cpu")
        count = torch.zeros(call.batch, call.query_heads, dtype=torch.float64, device="cpu")
        for rows in row_blocks(call):
            unknown = torch.full_like(rows.probs[..., 0], torch.nan)
            found = row_masses(rows, None if kinds is None else {kind: keys[rows.sample] for kind, keys in kinds.items()})
            used = rows.probs.any(dim=2) if counted is None else rows.probs.any(dim=2) & counted[rows.sample, rows.queries]
            for index, field in enumerate(self._fields):
                sums[index, rows.sample] += found.get(field, unknown).masked_fill(~used, 0.0).sum(dim=1).double().cpu()
            count[rows.sample] += used.sum(dim=1).cpu()
        means = sums / count.clamp(min=1)
        self._rows.add(site.name, **dict(zip(self._fields, means)))

    def found(self) -> dict[str, dict[str, Tensor]]:
        return self._rows.found()

    def _kinds_of_keys(self, batch: Any, call: AttentionCall) -> dict[str, Tensor] | None:
        """Kind -> bool [batch, kv_len]; None where the keys' ids or their kinds are not known."""
        ids = input_ids_of(batch)
        if self.setting.token_kinds is None or ids is None or ids.shape != (call.batch, call.kv_len):
            return None
        return self.setting.token_kinds.masks(ids.to(call.query.device))


def row_masses(rows: Rows, kinds: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Field -> [query_heads, rows]. kinds: kind -> bool [kv_len]."""

    def on(keys: Tensor) -> Tensor:
        return (rows.probs * keys).sum(dim=2)

    found = {
        "previous_mass": on(rows.ahead == -1), "self_mass": on(rows.ahead == 0), "local_mass": on(rows.ahead.abs() <= NEAR),
        "evenness": evenness(rows.probs),
    }  # fmt: skip
    if kinds is not None:
        found["special_mass"], found["punctuation_mass"] = on(kinds["special"]), on(kinds["punctuation"])
        found["ordinary_max_prob"] = rows.probs.masked_fill(kinds["special"], 0.0).amax(dim=2)
    return found


def evenness(probs: Tensor) -> Tensor:
    """[query_heads, rows]: entropy over that of equal attention to all keys in sight; 0 where only one is."""
    most = (probs > 0).sum(dim=2).clamp(min=1).to(probs.dtype).log()
    return torch.where(most > 0, torch.special.entr(probs).sum(dim=2) / most.clamp(min=torch.finfo(probs.dtype).tiny), 0.0)
