"""Criteria of the output projection's inputs, each against its formula on the inputs themselves."""

from itertools import combinations

import pytest
import torch
from tiny_models import bert, llama, padded

from headprune import scoring
from headprune.models import attention_sites
from headprune.models.gating import output_input_hook
from headprune.scoring.criteria.redundancy import facility_location_gains


def measured(model, names, batches):
    """Of the second site: scores by criterion, valid inputs [tokens, heads, width], weight [hidden, heads, width]."""
    site = attention_sites(model)[1]
    rows = []
    with torch.no_grad():
        for batch in batches:
            with output_input_hook(site, lambda inputs, batch=batch: rows.append(inputs[batch["attention_mask"].bool()])):
                model(**batch)
    heads, width = site.head_map.query_heads, site.value_dim
    weight = site.output.module.weight.detach().double().view(-1, heads, width)
    found = scoring.score(model, batches, names)
    return {name: scores[site.name] for name, scores in found.items()}, torch.cat(rows).double().view(-1, heads, width), weight


@pytest.mark.parametrize(("make", "side"), [(bert, "right"), (llama, "left")])
def test_criteria_follow_their_formulas_on_valid_tokens(make, side):
    names = ["fluctuation", "fluctuation_raw", "wanda", "output_energy", "redundancy", "redundancy_mean"]
    found, inputs, weight = measured(make(), names, [padded(side=side), padded(4, 12, side)])
    raw = (inputs.var(dim=0, correction=0) * weight.square().sum(dim=0)).sum(dim=1)
    assert torch.allclose(found["fluctuation_raw"].double(), raw, rtol=1e-4)
    assert torch.allclose(found["fluctuation"].double(), (raw - raw.mean()) / raw.std(correction=0), rtol=1e-3, atol=1e-3)
    energy = torch.einsum("rhd,thd->thr", weight, inputs).square().sum(dim=2).mean(dim=0)
    assert torch.allclose(found["output_energy"].double(), energy, rtol=1e-4)
    wanda = (weight.abs() * inputs.norm(dim=0)).sum(dim=(0, 2))
    assert torch.allclose(found["wanda"].double(), wanda, rtol=1e-4)
    centred = (inputs - inputs.mean(dim=0)).transpose(0, 1)
    heads = len(centred)
    similarity = torch.zeros(heads, heads, dtype=torch.float64)
    for i, j in combinations(range(heads), 2):
        own = (centred[i].T @ centred[i]).norm() * (centred[j].T @ centred[j]).norm()
        similarity[i, j] = similarity[j, i] = (centred[i].T @ centred[j]).norm() ** 2 / own
    assert torch.allclose(found["redundancy"].double(), 1 - similarity.amax(dim=1), atol=1e-4)
    assert torch.allclose(found["redundancy_mean"].double(), 1 - similarity.sum(dim=1) / (heads - 1), atol=1e-4)


def test_heads_that_give_large_constants_neither_vary_nor_resemble_another_nor_cost_the_others_digits():
    """Their squares are 10^4 times what varies: rounded to fp32 with it they left covariances of noise, none to factorise."""
    model, names = bert(), ["fluctuation_raw", "redundancy", "redundancy_mean", "diversity", "least_squares"]
    values = model.encoder.layer[1].attention.self.value
    with torch.no_grad():
        values.weight[:16], values.bias[:16] = 0.0, 30 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    found, inputs, weight = measured(model, names, [padded(7, 13, "right"), padded(4, 12, "right")])
    raw = (inputs.var(dim=0, correction=0) * weight.square().sum(dim=0)).sum(dim=1)
    assert (found["fluctuation_raw"][:2] == 0).all()
    assert torch.allclose(found["fluctuation_raw"][2:].double(), raw[2:], rtol=1e-4)
    for name in ("redundancy", "redundancy_mean"):  # what a bias gives as well goes first
        assert found[name].tolist()[:2] == [0.0, 0.0]
        assert (found[name][2:] > 0).all()
    assert (found["diversity"][:2] == 0).all()
    assert found["least_squares"][:2].max() < 0.01 < found["least_squares"][2:].min()


def test_of_two_equal_heads_diversity_lets_one_go_first():
    model = bert()
    attention = model.encoder.layer[1].attention
    for projection in (attention.self.query, attention.self.key, attention.self.value):
        projection.weight.data[24:32] = projection.weight.data[8:16]
        projection.bias.data[24:32] = projection.bias.data[8:16]
    found, _, _ = measured(model, ["diversity", "redundancy"], [padded(side="right")])
    assert int(found["diversity"].argmin()) in (1, 3)
    assert found["diversity"].min() == pytest.approx(0.0, abs=1e-4)
    assert set(found["redundancy"].topk(2, largest=False).indices.tolist()) == {1, 3}


def test_the_greedy_choice_is_near_the_best_and_its_gains_add_up_to_its_value():
    points = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    similarity = torch.exp(-torch.cdist(points, points))
    gains = facility_location_gains(similarity)
    value = lambda chosen: similarity[:, list(chosen)].amax(dim=1).sum()  # noqa: E731
    for count in range(1, 7):
        chosen = gains.topk(count).indices.tolist()
        assert value(chosen) == pytest.approx(float(gains.topk(count).values.sum()))
        assert value(chosen) >= (1 - 1 / torch.e) * max(value(subset) for subset in combinations(range(7), count))


@pytest.mark.parametrize("name", ["diversity", "redundancy", "redundancy_mean", "least_squares_by_head", "fluctuation"])
def test_a_layer_of_one_head_has_a_finite_score(name):
    found = scoring.score(bert(heads=1), [padded(side="right")], name)
    assert all(torch.isfinite(scores).all() for scores in found.values())
