import pytest
import torch

from headprune.errors import InvalidInput
from headprune.evaluation.metric import Metric, macro_f1, matthews, mean, pearson, perplexity, spearman

PREDICTED = [0, 0, 1, 2, 2, 1, 0, 2, 1, 1]
TRUE = [0, 1, 1, 2, 0, 1, 0, 2, 2, 3]


def test_a_metric_is_its_statistic_of_the_examples():
    assert Metric(torch.tensor([1.0, 0.0, 1.0, 1.0]), mean).value == 0.75
    rows = torch.tensor([[2.0, 1], [4.0, 5]])
    assert Metric(rows, perplexity).value == pytest.approx(2.718281828, rel=1e-6)
    with pytest.raises(InvalidInput, match="at least one example"):
        Metric(torch.empty(0), mean)


def test_macro_f1_is_the_mean_over_classes():
    scores = []
    for one in range(4):
        hits = sum(p == t == one for p, t in zip(PREDICTED, TRUE))
        scores.append(2 * hits / (PREDICTED.count(one) + TRUE.count(one)))
    assert macro_f1(torch.tensor([PREDICTED, TRUE]).T.double()) == pytest.approx(sum(scores) / 4)


def test_matthews_of_two_classes_is_the_textbook_formula():
    predicted, true = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 0]
    tp, tn, fp, fn = 3, 2, 2, 1
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert matthews(torch.tensor([predicted, true]).T.double()) == pytest.approx(expected)
    assert matthews(torch.tensor([[0.0, 1.0], [0.0, 0.0]])) == 0.0
    assert matthews(torch.tensor([TRUE, TRUE]).T.double()) == pytest.approx(1.0)


def test_correlations():
    torch.manual_seed(0)
    rows = torch.randn(40, 2).double()
    rows[:, 1] += rows[:, 0]
    assert pearson(rows) == pytest.approx(float(torch.corrcoef(rows.T)[0, 1]))
    assert spearman(rows) == pytest.approx(float(torch.corrcoef(rows.T.argsort().argsort().double())[0, 1]))
    assert spearman(torch.stack([rows[:, 0], rows[:, 0].exp()], dim=1)) == pytest.approx(1.0)
