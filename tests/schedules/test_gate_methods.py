"""Gates as their papers define them, each method by itself."""

import math

import pytest
import torch

from headprune.head_map import HeadMap
from headprune.planning import Budget
from headprune.schedules.gates.gate_method import Moment, get_gate_method
from headprune.schedules.gates.layout import GateLayout
from headprune.schedules.gates.subset import relaxed_top
from headprune.scoring import SiteShape

LATE = Moment(done=1.0, goal=0.5, rate=0.1, scale=1.0)


def gates(name: str, heads: int, norms: torch.Tensor | None = None, protected: tuple[int, ...] = ()):
    shapes = {"a": SiteShape(HeadMap.uniform(heads), 8, 8, 32, 100, 0)}
    layout = GateLayout.of(shapes, Budget(heads=0.5), "query_head", {"a": protected})
    return get_gate_method(name)(layout, torch.ones(heads) if norms is None else norms)


@torch.no_grad()
def test_hard_concrete_gates_are_0_and_1_as_often_as_the_distribution_says():
    """Louizos et al. 2018: beta 2/3, gamma -0.1, zeta 1.1; z is 0 where s <= 0.1 / 1.2 and 1 where s >= 1.1 / 1.2."""
    torch.manual_seed(0)
    method = gates("hard_concrete", 5)
    method.log_alpha.copy_(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]))
    drawn = torch.stack([method.drawn(LATE) for _ in range(20_000)])
    is_open = torch.sigmoid(method.log_alpha - 2 / 3 * math.log(0.1 / 1.1))
    is_one = torch.sigmoid(method.log_alpha - 2 / 3 * math.log(1.1 / 0.1))
    torch.testing.assert_close((drawn > 0).float().mean(dim=0), is_open, rtol=0, atol=0.015)  # four standard errors
    torch.testing.assert_close((drawn == 1).float().mean(dim=0), is_one, rtol=0, atol=0.015)
    torch.testing.assert_close(method.open_probability(), is_open)
    assert method.open_share(LATE) == pytest.approx(float(is_open.mean()))


@torch.no_grad()
def test_the_lagrangian_of_hard_concrete_is_linear_and_quadratic_in_the_gap():
    method = gates("hard_concrete", 4, protected=(3,))
    method.log_alpha.fill_(-1.0)
    gap = (3 * float(torch.sigmoid(-1 - torch.tensor(2 / 3 * math.log(0.1 / 1.1)))) + 1) / 4 - 0.5  # a protected gate is open
    assert float(method.penalty(LATE)) == pytest.approx(4 * 10 * gap**2, rel=1e-5)  # lambdas begin at 0 and 10
    method.after_step(LATE, torch.zeros(4))
    assert method.multipliers.tolist() == pytest.approx([gap, 10 + gap**2])


@torch.no_grad()
@pytest.mark.parametrize(("name", "pulls"), [("l1", [1.0, 1.0, 1.0, 1.0]), ("group_lasso", [0.5, 1.0, 2.0, 0.5])])
def test_a_proximal_step_moves_every_gate_to_0_and_none_past_it(name, pulls):
    method = gates(name, 4, torch.tensor([0.5, 1.0, 2.0, 0.5]))
    method.gates.copy_(torch.tensor([1.0, -1.0, 0.1, 0.0]))
    method.strength.fill_(1.5)
    method.after_step(LATE, torch.zeros(4))
    step = [0.1 * 1.5 * pull for pull in pulls]
    assert method.gates.tolist() == pytest.approx([1 - step[0], -1 + step[1], 0.0, 0.0])
    assert method.importance().tolist() == pytest.approx([pulls[0] * (1 - step[0]), pulls[1] * (1 - step[1]), 0.0, 0.0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["l1", "group_lasso"])
def test_the_pull_grows_while_more_is_open_than_the_goal(name):
    method = gates(name, 4)
    for _ in range(2):
        method.after_step(LATE, torch.zeros(4))  # all are open: 0.5 too much, half of which is added at each step
    assert float(method.strength) == pytest.approx(0.5)


@torch.no_grad()
def test_the_one_gate_that_a_goal_affords_is_drawn_by_the_softmax_of_the_logits():
    """Gumbel noise makes the largest of the noisy logits a draw from their softmax."""
    torch.manual_seed(0)
    method = gates("subset", 4)
    method.logits.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0]))
    one = Moment(done=1.0, goal=0.25, rate=0.1, scale=1.0)
    drawn = torch.stack([method.drawn(one) for _ in range(8_000)])
    assert torch.allclose(drawn.sum(dim=1), torch.ones(8_000), atol=1e-4)
    torch.testing.assert_close(drawn.mean(dim=0), method.logits.softmax(0), rtol=0, atol=0.025)
    assert method.settled(one).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_relaxed_top_is_that_many_softmaxes_each_without_what_was_taken(count, temperature):
    """Xie & Ermon 2019, eq. 8: a <- a + log(1 - p), p = softmax(a / t)."""
    logits = torch.tensor([0.3, -0.2, 1.1, 0.9])
    expected, weights = torch.zeros(4), logits.exp()
    for _ in range(count):
        share = weights ** (1 / temperature) / (weights ** (1 / temperature)).sum()
        expected, weights = expected + share, weights * (1 - share)
    torch.testing.assert_close(relaxed_top(logits, count, temperature), expected)
    assert float(expected.sum()) == pytest.approx(count)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_in_the_cold_the_relaxed_top_is_the_largest_ones(count):
    logits = torch.tensor([0.3, -0.2, 1.1, 0.9])
    expected = torch.zeros(4).index_fill(0, logits.topk(count).indices, 1.0)
    torch.testing.assert_close(relaxed_top(logits, count, 0.01), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("gap", [1.0, 6.0, 40.0])
def test_no_gate_is_taken_twice_however_far_it_leads(gap):
    logits = torch.tensor([gap, 0.1, 0.0, -0.1], requires_grad=True)
    taken = relaxed_top(logits, 2, 0.3)
    assert float(taken.detach().max()) < 1.001
    assert float(taken.detach().sum()) == pytest.approx(2, abs=1e-4)
    (gradient,) = torch.autograd.grad((taken * torch.tensor([0.0, 1.0, 0.0, 0.0])).sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[1] > 0 > gradient[2]


def test_groups_of_different_sizes_cost_and_score_by_their_heads():
    shapes = {"a": SiteShape(HeadMap((0, 0, 0, 1), 2), 8, 8, 32, 100, 0)}
    layout = GateLayout.of(shapes, Budget(heads=0.5), "kv_group", {"a": (3,)})
    assert [unit.heads for unit in layout.units] == [(0, 1, 2), (3,)]
    assert layout.costs.tolist() == [0.75, 0.25]
    assert layout.free.tolist() == [True, False]
    assert layout.by_site(torch.tensor([0.5, 1.0]))["a"].tolist() == [0.5, 0.5, 0.5, 1.0]
    assert layout.scores("gates", torch.tensor([6.0, 2.0]))["a"].tolist() == [2.0, 2.0, 2.0, 2.0]  # a group's heads sum to its own
