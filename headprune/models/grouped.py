"""SqueezeBERT, whose projections are convolutions in groups: each group of heads is made of its own part of the states, all by one
weight [features of all groups, part]. Groups that lost different heads would have no such weight, so it is refused."""

from __future__ import annotations

from torch import nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.site import AttentionSite, Foreign


class Grouped:
    name = "grouped"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        layers = [getattr(module, part, None) for part in ("query", "key", "value")]
        groups = [layer.groups for layer in layers if isinstance(layer, nn.Conv1d)]
        if len(groups) == len(layers) and max(groups) > 1:
            raise UnsupportedModel(
                f"{name} ({type(module).__name__}) projects by convolutions in {max(groups)} groups, each of which must keep as "
                "many features as the others, so single heads cannot go. It cannot be pruned."
            )
        return None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        """It has no sites."""


register_adapter(Grouped())
