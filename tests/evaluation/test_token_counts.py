"""What each attention runs, as its projections are called."""

import torch
from torch import nn

from headprune.evaluation.token_counts import TokenCount, count_tokens_of_sites
from headprune.models import attention_sites


class OwnAttention(nn.Module):
    """Reads every second token, and calls its projections by keyword."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, states):
        key, value = self.k_proj(input=states[:, ::2]), self.v_proj(input=states[:, ::2])
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q_proj(input=states), key, value))
        found = nn.functional.scaled_dot_product_attention(*heads)
        return self.o_proj(input=found.transpose(1, 2).flatten(2))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.idle = OwnAttention(), OwnAttention()

    def forward(self, states):
        return self.attention(self.attention(states))


def test_all_calls_and_samples_are_counted_and_what_is_not_reached_is_zero():
    model = Twice()
    found = count_tokens_of_sites(model, attention_sites(model), lambda: model(torch.randn(3, 6, 8)))
    assert found["attention"] == TokenCount(queries=2 * 3 * 6, keys=2 * 3 * 3, pairs=2 * 3 * 6 * 3)
    assert found["idle"] == TokenCount()
    assert not model.attention.o_proj._forward_pre_hooks
