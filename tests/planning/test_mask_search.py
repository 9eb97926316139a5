from itertools import combinations

import pytest
import torch
from tiny_models import llama, tokens

from headprune.errors import InvalidInput
from headprune.planning import Budget, fisher_mask_search
from headprune.planning.mask_search import block_fisher, rearranged
from headprune.scoring import observe


def loss_increase(fisher: torch.Tensor, kept) -> float:
    gone = torch.ones(len(fisher), dtype=torch.float64)
    gone[list(kept)] = 0.0
    return float(0.5 * gone @ fisher @ gone)


@pytest.mark.parametrize("seed", range(10))
def test_no_swap_is_left_that_lowers_the_block_sum(seed):
    gradients = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
    fisher = block_fisher(gradients)
    assert torch.allclose(fisher, (gradients[:, :, None] * gradients[:, None]).double().mean(dim=0), atol=1e-6)
    start = fisher.diagonal().topk(3).indices.tolist()
    kept = rearranged(fisher, start)
    assert len(kept) == 3
    assert loss_increase(fisher, kept) <= loss_increase(fisher, start)
    for out in kept:
        for back in set(range(7)) - set(kept):
            assert loss_increase(fisher, set(kept) - {out} | {back}) >= loss_increase(fisher, kept) - 1e-9


def test_heads_that_cancel_go_together_and_fixed_ones_stay():
    """Gradients of heads 0 and 1 are opposite: gone together they cost nothing, though each alone is costly."""
    large, small = torch.randn(50, 1), 0.3 * torch.randn(50, 2)
    fisher = block_fisher(torch.cat([large, -large, small], dim=1))
    assert rearranged(fisher, (0, 2)) == (2, 3)
    best = min(combinations(range(4), 2), key=lambda kept: loss_increase(fisher, kept))
    assert best == (2, 3)
    assert 0 in rearranged(fisher, (0, 2), fixed=(0,))


def test_the_search_keeps_the_budget_and_the_counts_of_its_start():
    batches = [{"input_ids": tokens(4, 8, seed), "labels": tokens(4, 8, seed)} for seed in range(2)]
    observed = observe(llama(), batches, {"gate_gradient"})
    found = fisher_mask_search(observed, Budget(heads=0.5), protect={"model.layers.0.self_attn": [3]})
    assert found.removed_heads == 8
    assert 3 in found["model.layers.0.self_attn"]
    with pytest.raises(InvalidInput, match="needs gate_gradient"):
        fisher_mask_search(observe(llama(), [], {"weights"}), Budget(heads=0.5))
