"""What the observers of attention patterns share: the model runs through our attention, where each site is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.models.gating import output_input_hooks
from headprune.models.site import AttentionSite
from headprune.models.tokens import valid_tokens
from headprune.models.watching import through_headprune, watching
from headprune.ops.call import AttentionCall
from headprune.ops.stats import HeadStats
from headprune.ops.watch import Watcher
from headprune.scoring.observer import Observer, Setting


@contextmanager
def refusing_unwatched(sites: Sequence[AttentionSite], seen: Set[str]) -> Iterator[None]:
    """InvalidInput at the end of the block where a site ran whose attention nobody saw. seen: the names of those that were."""
    arrived: list[AttentionSite] = []

    def noting(site: AttentionSite) -> Callable[[Tensor], None]:
        return lambda _inputs: arrived.append(site)

    with output_input_hooks(sites, noting):
        yield
    for site in arrived:
        if site.name not in seen:
            raise InvalidInput(
                f"{site.name} ({type(site.dispatcher).__name__}) computes its attention by itself, so its pattern cannot be "
                "observed: it neither calls transformers' attention interface nor is it a headprune.nn.VariableHeadAttention "
                "(headprune.nn.replace_multihead_attention gives one). Choose a criterion of gradients or of outputs."
            )


class WatchedAttention(Observer):
    """Calls `see` for each attention of each batch. A model's attention can be watched where it goes through transformers'
    attention interface or is a VariableHeadAttention; InvalidInput names any other module."""

    stats = False  # whether `see` gets HeadStats

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._seen: set[str] = set()

    def see(self, site: AttentionSite, batch: Any, call: AttentionCall, stats: HeadStats | None) -> None:
        raise NotImplementedError

    def reached(self) -> set[str]:
        return set(self._seen)

    def watching_pass(self) -> AbstractContextManager[object]:
        return through_headprune(self.setting.model)

    @contextmanager
    def watching_forward(self, batch: Any) -> Iterator[None]:
        sites = self.setting.sites
        with watching(sites, lambda site: self._watcher(site, batch)), refusing_unwatched(sites, self._seen):
            yield

    def counted(self, site: AttentionSite, batch: Any, query: Tensor) -> Tensor | None:
        """bool [batch, query_len]: the rows of `query` [batch, query_heads, query_len, head_dim] that are no padding."""
        mask = self.setting.token_mask(site.name, batch)
        return None if mask is None else valid_tokens(query[:, 0], mask)

    def _watcher(self, site: AttentionSite, batch: Any) -> Watcher:
        def seen(call: AttentionCall, stats: HeadStats | None) -> None:
            self._seen.add(site.name)
            with torch.no_grad():
                self.see(site, batch, call, stats)

        return Watcher(seen, self.stats, lambda query: self.counted(site, batch, query))
