"""CodeGen's forward takes its fused projection for four blocks with equally many heads. Any number of heads fits when features are
shared out among the blocks, not heads."""

from __future__ import annotations

from torch import Tensor

from headprune.models.behaviour import Behaviour


class QuarteredHeads(Behaviour):
    def _split_heads(self, x: Tensor, n_head: int, dim_head: int, mp_num: int) -> Tensor:
        """[..., blocks, features] -> [..., heads, dim_head]; a head may begin in one block and end in the next."""
        return x.reshape(*x.shape[:-2], -1, dim_head)
