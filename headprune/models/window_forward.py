"""Florence-2's attention to the windows of a picture takes the size of a head from the width of the states; once heads are gone it
computes the same with the heads that are there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import EmptiedAlone


class OwnWindows(Behaviour):
    config: Any
    qkv: nn.Module
    proj: nn.Module
    num_heads: int
    window_size: int
    scale: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, rows, columns, features] -> [batch, rows * columns, features]"""
        (_, rows, columns, _), side = hidden_states.shape, self.window_size
        padded = F.pad(hidden_states, (0, 0, 0, -columns % side, 0, -rows % side))
        windows = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        query, key, value = self.qkv(windows.flatten(0, 2).flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        functions: Any = ALL_ATTENTION_FUNCTIONS
        eager = getattr(sys.modules[type(self).__module__], "eager_attention_forward", None)
        function = functions.get_interface(self.config._attn_implementation, eager)
        heads = (states.transpose(1, 2) for states in (query, key, value))
        output: Tensor = self.proj(function(self, *heads, attention_mask=None, scaling=self.scale)[0].flatten(2))
        picture = output.view(*windows.shape[:-1], -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return picture[:, :rows, :columns].flatten(1, 2)


class EmptiedWindows(EmptiedAlone):
    def places(self, states: Tensor) -> Sequence[int]:
        return states.shape[0], states.shape[1] * states.shape[2]
