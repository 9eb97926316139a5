import math

import pytest
import torch
from tiny_models import bert, llama

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.scoring import HeadScores
from headprune.scoring.agreement import agreement, mean_ranks, spearman


def test_ties_share_the_mean_of_their_ranks():
    assert mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_spearman_is_the_correlation_of_ranks():
    first, second = torch.tensor([1.0, 10.0, 100.0, 3.0]), torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert spearman(first, first.exp()) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    assert spearman(first, second) == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))  # no ties: 1 - 6 sum d^2 / (n (n^2 - 1))
    assert math.isnan(spearman(first, torch.ones(4)))


def test_overlap_counts_the_heads_that_both_keep_of_the_whole_model():
    first = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([2.0, 1.0])}
    second = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([2.0, 3.0])}
    found = agreement(first, second, keep=0.5)
    assert found.overlap == 0.5
    assert found.by_site == {"a": pytest.approx(1.0), "b": pytest.approx(-1.0)}
    assert agreement(first, second, keep=1.0).overlap == 1.0


def test_scores_of_one_model_compare_and_those_of_two_are_refused():
    first = scoring.score(llama(), criterion="magnitude_l2")
    assert first.compare(first).spearman == pytest.approx(1.0)
    assert "Spearman" in str(first.compare(scoring.score(llama(), criterion="random")))
    with pytest.raises(InvalidInput, match="different models"):
        first.compare(scoring.score(bert(), criterion="random"))
    with pytest.raises(InvalidInput, match="keep is 0"):
        first.compare(first, keep=0)


def test_sites_that_were_not_reached_are_left_out():
    scores = scoring.score(llama(), criterion="magnitude_l2")
    hidden = next(iter(scores))
    values = {name: torch.full_like(found, torch.nan) if name == hidden else found for name, found in scores.items()}
    partial = HeadScores("partial", values, scores.shapes, unreached=frozenset({hidden}))
    found = scores.compare(partial)
    assert hidden not in found.by_site
    assert found.spearman == pytest.approx(1.0)
