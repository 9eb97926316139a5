from itertools import combinations

import pytest
import torch
from tiny_models import llama, tokens

from headprune.errors import InvalidInput
from headprune.planning import Budget, fisher_mask_search, plan
from headprune.planning.mask_search import rearranged
from headprune.scoring import observe, score_observations
from headprune.scoring.block_fisher import mean_outer_product


def loss_increase(fisher: torch.Tensor, kept) -> float:
    gone = torch.ones(len(fisher), dtype=torch.float64)
    gone[list(kept)] = 0.0
    return float(0.5 * gone @ fisher @ gone)


@pytest.mark.parametrize("seed", range(10))
def test_no_swap_is_left_that_lowers_the_block_sum(seed):
    gradients = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
    fisher = mean_outer_product(gradients)
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
    fisher = mean_outer_product(torch.cat([large, -large, small], dim=1))
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


@pytest.mark.parametrize("quantity", ["kv_cache", "params", "flops"])
def test_no_swap_brings_back_a_key_value_head_that_the_budget_has_no_room_for(quantity):
    batches = [{"input_ids": tokens(3, 9, seed), "labels": tokens(3, 9, seed)} for seed in range(4)]
    observed, budget = observe(llama(), batches, {"gate_gradient"}), Budget(**{quantity: 0.6})
    found, start = fisher_mask_search(observed, budget), plan(score_observations(observed, "fisher"), budget)
    for name, shape in found.shapes.items():
        assert budget.cost(shape, found.head_map(name)) <= budget.cost(shape, start.head_map(name))
        assert len(found[name]) == len(start[name])


def test_of_the_swaps_that_the_cost_allows_the_best_is_taken():
    """Heads 0 and 1 share keys, 2 and 3 too: bringing back 2 is best, and would bring back their key/value head."""
    fisher = torch.diag(torch.tensor([5.0, 1.0, 9.0, 1.0, 3.0], dtype=torch.float64))
    assert rearranged(fisher, (0, 1, 4)) == (0, 2, 4)

    def caches(kept):
        return len({(0, 0, 1, 1, 2)[head] for head in kept})

    assert rearranged(fisher, (0, 1, 4), cost=caches) == (0, 1, 2)
    assert rearranged(fisher, (0, 1), cost=caches) == (0, 1)
    assert rearranged(fisher, (1, 3), cost=caches) == (0, 2)
