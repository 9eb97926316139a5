import pytest
import torch
from tiny_models import llama, tokens

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.models import gated
from headprune.planning import Budget, PruningPlan, evolve, masked_fitness, plan
from headprune.scoring import HeadScores, SiteShape, score

BATCHES = [{"input_ids": tokens(3, 8, seed), "labels": tokens(3, 8, seed)} for seed in range(2)]


def start(layers: int = 3, budget: float = 0.5) -> PruningPlan:
    return plan(score(llama(layers=layers), criterion="random"), Budget(heads=budget), allocation="uniform")


def test_the_fitness_of_a_plan_is_its_loss_on_the_data():
    model, chosen = llama(layers=3), start()
    other = plan(chosen.scores, Budget(heads=0.25))
    found = masked_fitness(model, BATCHES)([chosen, other])
    for one, loss in zip((chosen, other), found):
        with gated(model, one), torch.no_grad():
            assert loss == pytest.approx(float(torch.stack([model(**batch).loss for batch in BATCHES]).mean()), rel=1e-5)


@pytest.mark.parametrize("quantity", ["heads", "params", "kv_cache"])
def test_the_search_finds_planted_counts_and_never_costs_more(quantity):
    """Fitness is the distance to counts that the start is far from."""
    scores = score(llama(layers=3), criterion="random")
    origin = plan(scores, Budget(**{quantity: 0.5}), allocation="uniform", granularity="query_head")
    wanted = (7, 4, 1)
    distance = lambda plans: [sum(abs(len(h) - w) for h, w in zip(one.values(), wanted)) for one in plans]  # noqa: E731
    found = evolve(origin, distance, generations=40, children=12)
    cost = lambda one: sum(one.budget.cost(one.shapes[name], one.head_map(name)) for name in one)  # noqa: E731
    assert cost(found.plan) <= cost(origin)
    assert found.best < found.start
    if quantity == "heads":
        assert tuple(len(heads) for heads in found.plan.values()) == wanted
    assert list(found.history) == sorted(found.history, reverse=True)
    for name, heads in found.plan.items():  # within a site the scores decide
        assert set(heads) == set(scores[name].topk(len(heads)).indices.tolist())


def unlike() -> HeadScores:
    """A layer of small heads and one whose heads cost three times as much."""
    shapes = {name: SiteShape(HeadMap.uniform(6), 8, 8, 32, size, 0) for name, size in (("small", 100), ("large", 300))}
    return HeadScores("test", {name: torch.arange(6.0) for name in shapes}, shapes)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_fitter_but_costs_more_is_not_taken(seed):
    origin = plan(unlike(), Budget(params=0.5), allocation="uniform")  # 3 * 100 + 3 * 300
    found = evolve(origin, lambda plans: [-len(one["large"]) for one in plans], generations=10, seed=seed).plan
    assert found.keep == origin.keep  # a small head for a large one is 200 too much


@pytest.mark.parametrize("min_heads", [0, 1, 2])
def test_a_site_keeps_as_many_heads_as_are_asked_for(min_heads):
    origin = plan(unlike(), Budget(params=0.5), allocation="uniform")
    found = evolve(origin, lambda plans: [len(one["large"]) for one in plans], generations=10, min_heads=min_heads)
    assert len(found.plan["large"]) == min_heads


def test_a_search_on_the_loss_does_not_end_worse_than_it_began():
    model = llama(layers=3)
    found = evolve(start(), masked_fitness(model, BATCHES), generations=4, children=4)
    again = evolve(start(), masked_fitness(model, BATCHES), generations=4, children=4)
    assert found.best <= found.start
    assert found.plan.keep == again.plan.keep
    assert found.plan.removed_heads == 12


def test_a_plan_by_hand_cannot_evolve():
    with pytest.raises(InvalidInput, match="scores and a budget"):
        evolve(PruningPlan.from_keep(llama(), {}), lambda plans: [0.0] * len(plans))
    with pytest.raises(InvalidInput, match="empty"):
        masked_fitness(llama(), [])


def test_a_plan_whose_heads_do_not_go_by_its_scores_is_refused_and_not_changed_without_a_word():
    scores = score(llama(), criterion="random")
    name = next(iter(scores))
    lowest = int(scores[name].argmin())
    protected = plan(scores, Budget(heads=0.5), protect={name: [lowest]})
    with pytest.raises(InvalidInput, match=rf"at {name} the plan keeps heads \[.*{lowest}.*, by its scores .* hp\.search_plan"):
        evolve(protected, lambda plans: [0.0] * len(plans))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switches": 0}, "switches is 0; expected a whole number, 1 or more"),
        ({"generations": 1.5}, r"generations is 1\.5; expected a whole number"),
        ({"children": 0}, "children is 0; expected a whole number, 1 or more"),
        ({"min_heads": -1}, "min_heads is -1; expected a whole number, 0 or more"),
        ({"fitness": lambda plans: [float("nan")] * len(plans)}, r"the fitness of 1 plans is \[nan\]; expected as many numbers"),
        ({"fitness": lambda plans: []}, r"the fitness of 1 plans is \[\]; expected as many numbers"),
        ({"plan": None}, r"plan is None; expected PruningPlan \(hp\.plan gives one\)"),
    ],
)
def test_what_no_search_can_be_made_with_is_named(options, message):
    with pytest.raises(InvalidInput, match=message):
        evolve(**{"plan": start(), "fitness": lambda plans: [0.0] * len(plans), **options})
