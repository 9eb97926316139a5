import pytest
import torch

from headprune.errors import InvalidInput
from headprune.evaluation.bootstrap import paired_bootstrap
from headprune.evaluation.metric import Metric, mean, pearson


def metric(values):
    return Metric(torch.as_tensor(values, dtype=torch.float64), mean)


def test_pairing_sees_a_small_steady_difference_in_noisy_examples():
    torch.manual_seed(0)
    noise = torch.randn(200).double()
    found = paired_bootstrap(metric(noise), metric(noise - 0.1))
    assert found.difference == pytest.approx(-0.1)
    assert found.low == pytest.approx(-0.1)
    assert found.high == pytest.approx(-0.1)
    assert found.settled
    assert (found.examples, found.level) == (200, 0.95)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    torch.manual_seed(0)
    first, second = torch.randn(400).double(), torch.randn(400).double()
    found = paired_bootstrap(metric(first), metric(second), level=0.9, resamples=4000)
    spread = 1.645 * float((second - first).std()) / 20
    assert found.low == pytest.approx(found.difference - spread, abs=0.1 * spread)
    assert found.high == pytest.approx(found.difference + spread, abs=0.1 * spread)


def test_equal_models_do_not_differ_and_draws_without_a_value_are_left_out():
    rows = torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 2.5]])
    found = paired_bootstrap(Metric(rows, pearson), Metric(rows, pearson))
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.settled


def test_the_same_draws_every_time_and_refusals():
    first, second = metric([0.0, 1.0, 1.0]), metric([1.0, 1.0, 0.0])
    assert paired_bootstrap(first, second) == paired_bootstrap(first, second)
    with pytest.raises(InvalidInput, match="on 3 and 2 examples"):
        paired_bootstrap(first, metric([0.0, 1.0]))
    with pytest.raises(InvalidInput, match="level is 95"):
        paired_bootstrap(first, second, level=95)
