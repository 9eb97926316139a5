import pytest
import torch
from tiny_models import bert, padded

from headprune.errors import InvalidInput
from headprune.planning import Budget, diverse, plan
from headprune.planning.diversity import removal_prices
from headprune.scoring import HeadScores, Need, observe, score


def test_of_two_copies_one_goes_early_and_the_other_keeps_its_worth():
    scores = torch.tensor([5.0, 5.5, 3.0])
    similarity = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    # 5 (1 - .9) = 0.5 is the least; then 5.5 (1 - .2) = 4.4 against 3 (1 - .2) = 2.4; the last one costs all.
    assert removal_prices(scores, similarity, 1.0).tolist() == pytest.approx([0.5, 5.5, 2.4])
    assert removal_prices(scores, similarity, 0.0).tolist() == pytest.approx([5.0, 5.5, 3.0])


def test_a_plan_by_diversity_keeps_one_of_two_equal_heads():
    model = bert(layers=1)
    attention = model.encoder.layer[0].attention
    for projection in (attention.self.query, attention.self.key, attention.self.value):
        projection.weight.data[8:16] = projection.weight.data[24:32]
        projection.bias.data[8:16] = projection.bias.data[24:32]
    observed = observe(model, [padded(side="right")], {Need.GRAM}, loss_fn=lambda model, batch: model(**batch))
    (name,) = observed
    shapes = score(model, criterion="random").shapes
    scores = HeadScores("by_hand", {name: torch.tensor([1.0, 3.0, 2.0, 3.5])}, shapes)
    assert plan(scores, Budget(heads=0.5))[name] == (1, 3)  # the two copies
    chosen = plan(diverse(scores, observed), Budget(heads=0.5))[name]
    assert 3 in chosen
    assert 1 not in chosen


def test_bad_input_is_refused():
    model = bert(layers=1)
    observed = observe(model, [padded(side="right")], {Need.GRAM}, loss_fn=lambda model, batch: model(**batch))
    scores = score(model, criterion="magnitude_l2")
    with pytest.raises(InvalidInput, match="strength is 2"):
        diverse(scores, observed, 2)
    with pytest.raises(InvalidInput, match=r"observe Need\.GRAM"):
        diverse(scores, observe(model, [], {Need.WEIGHTS}))
    negative = HeadScores("by_hand", {name: -found for name, found in scores.items()}, scores.shapes)
    with pytest.raises(InvalidInput, match="negative scores"):
        diverse(negative, observed)
