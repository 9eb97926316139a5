"""What the observers of attention patterns share: the model runs through our attention, where each site is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.models.gating import output_input_hook
from headprune.models.site import AttentionSite
from headprune.models.tokens import valid_tokens
from headprune.models.watching import through_headprune, watching
from headprune.ops.call import AttentionCall
from headprune.ops.stats import HeadStats
from headprune.ops.watch import Watcher
from headprune.scoring.observer import Observer, Setting


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
        arrived: list[AttentionSite] = []

        def noting(site: AttentionSite) -> Callable[[Tensor], None]:
            return lambda _inputs: arrived.append(site)

        with ExitStack() as stack:
            stack.enter_context(watching(self.setting.sites, lambda site: self._watcher(site, batch)))
            for site in self.setting.sites:
                stack.enter_context(output_input_hook(site, noting(site)))
            yield
        for site in arrived:
            if site.name not in self._seen:
                raise InvalidInput(
                    f"{site.name} ({type(site.dispatcher).__name__}) computes its attention by itself, so its pattern cannot be "
                    "observed: it neither calls transformers' attention interface nor is it a headprune.nn.VariableHeadAttention "
                    "(headprune.nn.replace_multihead_attention gives one). Choose a criterion of gradients or of outputs."
                )

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
