from itertools import pairwise

import pytest
import torch
from tiny_models import bert, llama, padded, tokens

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.models.gating import output_input_hook
from headprune.scoring import Need, Observations
from headprune.scoring.criteria import least_squares as criterion

HEADS, WIDTH, OUTPUTS = 5, 3, 7


def error_without(gram: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """E||W x - V x_kept||^2 for the best V, by solving for V."""
    columns = [head * WIDTH + column for head in kept for column in range(WIDTH)]
    whole = (weight @ gram @ weight.T).trace()
    if not columns:
        return float(whole)
    solved = torch.linalg.solve(gram[columns][:, columns], gram[columns] @ weight.T)
    return float(whole - (weight @ gram[:, columns] @ solved).trace())


@pytest.mark.parametrize("seed", range(4))
def test_removal_costs_are_the_least_squares_errors_of_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(HEADS * WIDTH, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    gram, weight = inputs.T @ inputs / 60, torch.randn(OUTPUTS, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    order, costs = criterion.removal_costs(gram, weight.T @ weight, HEADS)
    kept, reached = list(range(HEADS)), 0.0
    assert sorted(order) == kept
    for head, cost in zip(order, costs):
        errors = {other: error_without(gram, weight, [one for one in kept if one != other]) for other in kept}
        assert head == min(errors, key=errors.get)
        reached += cost
        assert reached == pytest.approx(errors[head], rel=1e-6)
        kept.remove(head)


def batches_for(count: int = 12) -> list[dict]:
    return [{"input_ids": tokens(6, 16, seed), "attention_mask": torch.ones(6, 16, dtype=torch.long)} for seed in range(count)]


def inputs_of(model, site, batches) -> torch.Tensor:
    """[tokens, features]: all that the site's output projection receives."""
    rows = []
    with torch.no_grad(), output_input_hook(site, lambda inputs: rows.append(inputs.flatten(0, 1))):
        for batch in batches:
            model(**batch)
    return torch.cat(rows).double()


@pytest.mark.parametrize("make", [bert, llama])
def test_the_cheapest_head_scores_what_regression_cannot_replace(make, monkeypatch):
    """With an intercept where the projection has a bias (BERT), without one where it has none (Llama)."""
    monkeypatch.setattr(criterion, "RIDGE", 1e-9)
    model, batches = make(), batches_for()
    site = attention_sites(model)[1]
    scores = scoring.score(model, batches, "least_squares", loss_fn=lambda model, batch: model(**batch))[site.name]
    inputs, weight = inputs_of(model, site, batches), site.output.module.weight.detach().double()
    targets = inputs @ weight.T
    ones = torch.ones(len(inputs), 0 if site.output.module.bias is None else 1, dtype=torch.float64)
    lost = []
    for head in range(len(scores)):
        columns = [column for column in range(inputs.shape[1]) if site.head_of_column()[column] != head]
        features = torch.cat([inputs[:, columns], ones], dim=1)
        lost.append((targets - features @ torch.linalg.lstsq(features, targets).solution).square().sum())
    whole = (targets - (targets.mean(0) if ones.shape[1] else 0.0)).square().sum()
    assert int(scores.argmin()) == int(torch.stack(lost).argmin())
    assert float(scores.min()) == pytest.approx(float(min(lost) / whole), rel=1e-3)


@pytest.mark.parametrize("make", [bert, llama])
def test_the_error_of_each_head_alone_is_that_of_regression_without_it(make, monkeypatch):
    monkeypatch.setattr(criterion, "RIDGE", 1e-9)
    model, batches = make(), batches_for()
    site = attention_sites(model)[0]
    scores = scoring.score(model, batches, "least_squares_by_head", loss_fn=lambda model, batch: model(**batch))[site.name]
    inputs, weight = inputs_of(model, site, batches), site.output.module.weight.detach().double()
    if site.output.module.bias is not None:
        inputs = inputs - inputs.mean(dim=0)
    for head, found in enumerate(scores.tolist()):
        others = inputs[:, site.head_of_column() != head]
        lost = inputs @ weight.T - others @ torch.linalg.lstsq(others, inputs @ weight.T).solution
        assert found == pytest.approx(float(lost.square().sum() / len(inputs)), rel=1e-3)


def test_scores_rise_along_the_order_of_removal():
    scores = scoring.score(bert(), batches_for(3), "least_squares", loss_fn=lambda model, batch: model(**batch))
    for found in scores.values():
        ascending = found.sort().values.tolist()
        assert all(first < second for first, second in pairwise(ascending))
        assert ascending[0] > 0
        assert ascending[-1] < 1


def test_layers_are_weighed_by_their_fisher_information():
    batches = [{"input_ids": tokens(4, 10, seed), "labels": tokens(4, 10, seed)} for seed in range(3)]
    names = ["fisher", "least_squares", "fisher_least_squares"]
    found = scoring.score(llama(), batches, names)
    for site, scores in found["fisher_least_squares"].items():
        assert torch.allclose(scores, found["least_squares"][site] * found["fisher"][site].sum().sqrt())


def test_a_copied_head_is_the_first_to_go():
    model = bert(layers=1)
    attention = model.encoder.layer[0].attention
    for projection in (attention.self.query, attention.self.key, attention.self.value):
        projection.weight.data[8:16] = projection.weight.data[:8]
        projection.bias.data[8:16] = projection.bias.data[:8]
    scores = scoring.score(model, batches_for(), "least_squares", loss_fn=lambda model, batch: model(**batch))
    found = scores["encoder.layer.0.attention"]
    assert int(found.argmin()) in (0, 1)
    assert found.min() < 0.05 * found.sort().values[1]


def grams(model, batches, **options) -> Observations:
    return scoring.observe(model, batches, {Need.GRAM}, loss_fn=lambda model, batch: model(**batch), **options)


def test_gram_matrices_of_parts_add_up_to_those_of_the_whole():
    model, batches = bert(), batches_for(4)
    whole, merged = grams(model, batches), grams(model, batches[:1]) + grams(model, batches[1:])
    for name, site in whole.items():
        for field in ("input_gram", "input_sum", "tokens"):
            assert torch.allclose(getattr(merged[name], field), getattr(site, field), rtol=1e-12, atol=1e-12)
        assert torch.equal(merged[name].output_gram, site.output_gram)
        assert site.tokens == 4 * 6 * 16


def test_gram_matrices_are_sums_over_tokens():
    model, batches = llama(), batches_for(2)
    site = attention_sites(model)[0]
    inputs, found = inputs_of(model, site, batches), grams(model, batches)[site.name]
    assert torch.allclose(found.input_gram, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.input_sum, inputs.sum(dim=0), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.output_l1, site.output.module.weight.detach().double().abs().sum(dim=0))
    assert torch.allclose(found.output_gram, (lambda w: w.T @ w)(site.output.module.weight.detach().double()))


def test_padded_tokens_are_in_no_gram_matrix():
    model, batch = bert(), padded(side="right")
    longer = {name: torch.cat([values, torch.zeros(3, 4, dtype=torch.long)], dim=1) for name, values in batch.items()}
    first, second = grams(model, [batch]), grams(model, [longer])
    for name in first:
        assert first[name].tokens == second[name].tokens == batch["attention_mask"].sum()
        assert torch.allclose(first[name].input_gram, second[name].input_gram, rtol=1e-3, atol=1e-3)
    with pytest.raises(InvalidInput, match=r"token mask is \[3, 8\]"):
        grams(model, [batch], token_mask=lambda batch: batch["attention_mask"][:, 1:])


def test_gram_matrices_survive_the_disk(tmp_path):
    observed = grams(bert(), batches_for(1))
    observed.save(tmp_path / "observed.safetensors")
    again = Observations.load(tmp_path / "observed.safetensors")
    for name, site in observed.items():
        for field in ("input_gram", "input_sum", "tokens", "output_gram"):
            assert torch.equal(getattr(again[name], field), getattr(site, field))
