"""The dynamic program against every choice there is."""

from itertools import product

import pytest
import torch

from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.head_map import HeadMap
from headprune.planning import Budget, plan
from headprune.planning.optimal import Option, cheapest
from headprune.scoring import HeadScores, SiteShape


def scores_of(*values: list[float], kv_heads: int = 2) -> HeadScores:
    """Sites of different widths, so that heads cost differently."""
    shapes = {
        f"layer{index}": SiteShape(HeadMap.uniform(len(scores), kv_heads), 8, 8, 16 + 16 * index, 40 + 30 * index, 25 + 10 * index)
        for index, scores in enumerate(values)
    }
    return HeadScores("test", dict(zip(shapes, map(torch.tensor, values))), shapes)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    error = lambda: float(torch.rand((), generator=generator))  # noqa: E731
    sites = [[Option(frozenset(range(k)), draw(1, 30), error()) for k in range(draw(1, 5))] for _ in range(4)]
    least = sum(min(option.cost for option in site) for site in sites)
    target = least + draw(0, 40)
    found = cheapest(sites, target)
    every = [choice for choice in product(*sites) if sum(option.cost for option in choice) <= target]
    assert sum(option.cost for option in found) <= target
    assert sum(option.error for option in found) == pytest.approx(min(sum(o.error for o in choice) for choice in every))


@pytest.mark.parametrize("budget", [{"heads": 0.5}, {"params": 0.4}, {"kv_cache": 0.5}, {"flops": 0.3}, {"params": 0.0}])
@pytest.mark.parametrize("granularity", ["query_head", "kv_group"])
def test_plans_lose_no_more_score_than_greedy_ones_and_keep_the_budget(budget, granularity):
    generator = torch.Generator().manual_seed(3)
    scores = scores_of(*(torch.rand(8, generator=generator).tolist() for _ in range(4)))
    lost = {}
    for allocation in ("global", "optimal"):
        found = plan(scores, Budget(**budget), allocation=allocation, granularity=granularity)
        cost = lambda head_map, name: found.budget.cost(found.shapes[name], head_map)  # noqa: B023, E731
        full = sum(cost(found.shapes[name].head_map, name) for name in found)
        assert sum(cost(found.head_map(name), name) for name in found) <= (1 - found.budget.fraction) * full + 1e-6
        lost[allocation] = sum(float(scores[name].sum() - scores[name][list(heads)].sum()) for name, heads in found.items())
    assert lost["optimal"] <= lost["global"] + 1e-6


def test_a_quantity_of_large_numbers_is_never_exceeded():
    sites = [[Option(frozenset(range(k)), 123_457_891 * (8 - k), float(k)) for k in range(9)] for _ in range(6)]
    target = 3 * 8 * 123_457_891
    found = cheapest(sites, target)
    assert target - 123_457_891 < sum(option.cost for option in found) <= target


@pytest.mark.parametrize("seed", range(10))
def test_costs_without_a_common_divisor_are_rounded_against_the_choice_never_for_it(seed):
    """Rounding up takes less than one step from each site, so the choice is at least as good as the best with that much less."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    sites = [
        [Option(frozenset(range(k)), draw(500_000, 900_000) * (5 - k), 0.7**-k + draw(0, 99) / 999) for k in range(5)]
        for _ in range(7)
    ]
    target = draw(9_000_000, 12_000_000)
    step = -(-target // 10_000)
    found = cheapest(sites, target)
    less = [choice for choice in product(*sites) if sum(option.cost for option in choice) <= target - len(sites) * step]
    assert sum(option.cost for option in found) <= target
    assert sum(option.error for option in found) <= min(sum(option.error for option in choice) for choice in less) + 1e-9


def test_a_choice_above_the_target_by_less_than_a_step_is_not_taken():
    """Steps of 3: the target is 6669 of them and a rest, and so is 20 009, which is one too many."""
    site = [Option(frozenset(), 20_009, 0.0), Option(frozenset({0}), 10_007, 1.0)]
    assert cheapest([site], 20_008) == [site[1]]
    assert cheapest([site], 20_010) == [site[0]]


def test_where_only_rounding_forbids_the_smallest_choice_it_is_taken():
    """Steps of 3: 10 007 is 3336 of them, twice that is more than the 6671 of the target, which the costs themselves just meet."""
    sites = [[Option(frozenset(), 20_011, 0.0), Option(frozenset({0}), 10_007, 1.0)]] * 2
    assert [option.cost for option in cheapest(sites, 2 * 10_007)] == [10_007, 10_007]


@pytest.mark.parametrize("allocation", ["global", "uniform", "optimal"])
@pytest.mark.parametrize("granularity", ["query_head", "kv_group"])
def test_a_budget_that_a_site_can_meet_to_the_head_takes_no_head_more(allocation, granularity):
    scores = scores_of([4.0, 1.0, 3.0, 2.0, 8.0, 5.0, 7.0, 6.0], kv_heads=4)
    found = plan(scores, Budget(heads=0.5), allocation=allocation, granularity=granularity)
    assert found["layer0"] == (4, 5, 6, 7)


def test_an_infeasible_budget_names_the_nearest_that_is_met():
    scores = scores_of([1.0, 2.0], [1.0, 2.0])
    for allocation in ("global", "optimal"):
        with pytest.raises(InfeasibleBudget, match=r"nearest budget that can be met is heads=0\.5;"):
            plan(scores, Budget(heads=0.9), allocation=allocation)
        assert plan(scores, Budget(heads=0.5), allocation=allocation).removed_heads == 2


@pytest.mark.parametrize("allocation", ["global", "uniform", "optimal"])
def test_sites_keep_multiples(allocation):
    generator = torch.Generator().manual_seed(5)
    scores = scores_of(*(torch.rand(14, generator=generator).tolist() for _ in range(3)))
    found = plan(scores, Budget(heads=0.4), allocation=allocation, multiple_of=4)
    assert all(len(heads) in (14, 12, 8, 4) for heads in found.values())
    assert found.removed_heads >= 17
    for name, heads in found.items():  # within a site the lowest go
        assert set(heads) == set(scores[name].topk(len(heads)).indices.tolist())
    with pytest.raises(InvalidInput, match="multiple_of is 0"):
        plan(scores, Budget(heads=0.4), multiple_of=0)


def test_where_all_heads_would_rather_go_the_one_that_costs_least_to_keep_stays():
    scores = scores_of([-0.4, -0.5], [-0.3, -0.1], [-0.2, -0.6])
    found = plan(scores, Budget(heads=0.5), allocation="optimal", min_heads=0)
    assert {name: heads for name, heads in found.items() if heads} == {"layer1": (1,)}


def test_where_not_even_one_head_can_be_paid_the_budget_is_refused():
    scores = scores_of([0.1, 0.2], [0.3, 0.9])
    with pytest.raises(InfeasibleBudget, match="params"):
        plan(scores, Budget(params=0.99), allocation="optimal", min_heads=0)
