import logging
import pickle
from dataclasses import replace

import pytest
import torch
from tiny_models import llama, tokens

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.planning import Budget, PruningPlan, plan
from headprune.scoring import HeadScores, Need, Observations, ranking_stability, stability, unsettled_heads
from headprune.scoring.stability import bootstrap, spread_of
from headprune.surgery import prune


def observed(samples: int, seed: int = 0, noise: float = 1.0) -> Observations:
    """Gate gradients whose size grows from head to head, with noise between the samples."""
    found = scoring.observe(llama(), [], {"weights"})
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for number, (name, site) in enumerate(found.items()):
        size = 1.0 + torch.arange(8) + 8 * number
        sites[name] = replace(site, gate_gradient=size * (1 + noise * torch.randn(samples, 8, generator=generator)))
    return Observations(sites)


def test_the_spread_of_a_mean_is_its_standard_error():
    found = observed(400)
    spread = spread_of(found, scoring.get_criterion("gate_gradient"), {name: torch.zeros(8) for name in found})
    for name, site in found.items():
        expected = site.gate_gradient.abs().std(dim=0) / 20
        assert torch.allclose(spread[name], expected, rtol=0.5)
        assert (spread[name] / expected).mean() == pytest.approx(1.0, abs=0.15)


def test_the_spread_is_computed_once_when_it_is_read(monkeypatch):
    drawn = []
    monkeypatch.setattr(stability, "bootstrap", lambda *args: drawn.append(args) or bootstrap(*args))
    scores = scoring.score_observations(observed(20), "fisher")
    assert scores.spread is not None
    assert not drawn
    copied = pickle.loads(pickle.dumps(scores))
    for name in scores:
        assert torch.equal(copied.spread[name], scores.spread[name])
    assert len(drawn) == 1


def test_criteria_that_look_at_values_are_drawn_one_after_another_to_the_same_scores():
    fisher = scoring.get_criterion("fisher")

    def looking(site):
        rows = site.gate_gradient
        return rows.square().mean(dim=0) if float(rows.abs().max()) > 0 else torch.zeros(8)

    found = observed(20)
    together, in_turn = (bootstrap(found, chosen, 5) for chosen in (fisher, replace(fisher, function=looking)))
    assert len(together) == len(in_turn) == 5
    for one, other in zip(together, in_turn):
        assert all(torch.allclose(one[name], other[name]) for name in found)
    assert not torch.allclose(together[0]["model.layers.0.self_attn"], together[1]["model.layers.0.self_attn"])


def test_drawing_in_small_parts_changes_nothing(monkeypatch):
    found, fisher = observed(20), scoring.get_criterion("fisher")
    whole = bootstrap(found, fisher, 5)
    monkeypatch.setattr(stability, "MOST_AT_ONCE", 1)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(whole, bootstrap(found, fisher, 5)) for name in found)


def test_scores_of_samples_carry_their_spread_to_the_disk_and_others_have_none(tmp_path):
    scores = scoring.score_observations(observed(20), "fisher")
    scores.save(tmp_path / "scores.json")
    again = HeadScores.load(tmp_path / "scores.json")
    assert all(torch.equal(again.spread[name], scores.spread[name]) for name in scores)
    assert scoring.score(llama(), criterion="magnitude_l1").spread is None


def test_more_samples_make_a_ranking_more_stable_and_settle_heads():
    few, many = (ranking_stability(observed(count), "gate_gradient", keep=0.5) for count in (4, 400))
    assert few.spearman < many.spearman <= 1
    assert few.overlap < many.overlap <= 1
    assert sum(map(len, many.unsettled.values())) < sum(map(len, few.unsettled.values()))
    seeds = ranking_stability([observed(400, seed) for seed in range(3)], "gate_gradient")
    assert seeds.spearman > 0.95


def test_without_noise_nothing_is_unsettled():
    found = observed(10, noise=0.0)
    assert ranking_stability(found, "fisher").unsettled == {}
    scores = scoring.score_observations(found, "fisher")
    assert unsettled_heads(scores, plan(scores, Budget(heads=0.5)).keep) == {}


def test_a_plan_from_too_few_samples_says_so(caplog):
    with caplog.at_level(logging.WARNING, "headprune"):
        plan(scoring.score_observations(observed(400), "gate_gradient"), Budget(heads=0.5))
        assert not caplog.records
        plan(scoring.score_observations(observed(3), "gate_gradient"), Budget(heads=0.5))
    assert "too few calibration samples" in caplog.text


def test_sums_cannot_be_drawn_again_but_parts_of_the_data_compare():
    batches = [{"input_ids": tokens(4, 12, seed)} for seed in range(2)]
    parts = [scoring.observe(llama(), [batch], {Need.GRAM}) for batch in batches]
    with pytest.raises(InvalidInput, match="give them as a list"):
        ranking_stability(parts[0], "wanda")
    assert -1 <= ranking_stability(parts, "wanda").spearman <= 1
    with pytest.raises(InvalidInput, match="at least two"):
        ranking_stability(parts[:1], "wanda")


def test_an_attention_without_heads_has_no_ranking_and_stops_nothing():
    model = llama(layers=3)
    prune(model, PruningPlan.from_keep(model, {"model.layers.1.self_attn": []}))
    batches = [{"input_ids": tokens(4, 9, seed), "labels": tokens(4, 9, seed)} for seed in range(2)]
    needs = {"gate_gradient", "attention", "attention_pattern"}
    draws = [scoring.observe(model, [batch], needs) for batch in batches]
    assert ranking_stability(draws[0], "fisher").spearman <= 1
    assert ranking_stability(draws, "fisher").spearman <= 1
    assert scoring.block_fisher(draws[0])["model.layers.1.self_attn"].shape == (0, 0)
    assert list(scoring.portraits(draws[0])) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def test_an_attention_that_some_draw_does_not_reach_is_left_out():
    draws = [observed(20, seed) for seed in range(2)]
    name = "model.layers.0.self_attn"
    lacking = Observations({**draws[1], name: replace(draws[1][name], reached=False, gate_gradient=torch.zeros(0, 8))})
    found = ranking_stability([draws[0], lacking], "fisher")
    assert found == ranking_stability([Observations({k: v for k, v in one.items() if k != name}) for one in draws], "fisher")
