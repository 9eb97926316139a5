"""Criteria that switch heads off, each against a slow loop from its formula."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from masked_models import CASES, Layers, on_states, squares
from tiny_models import bert, llama, tokens

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.models import attention_sites, gated
from headprune.scoring.criteria.regression import ridge
from headprune.scoring.criteria.shapley import shapley_interval
from headprune.scoring.observers.masks import IntegratedGradients, MaskTrials, ShapleyMarginals
from headprune.scoring.sample_losses import OwnLoss
from headprune.scoring.shapley import permutation_marginals

NEEDS = ("ablation", "shapley", "mask_trials", "integrated_gradient")
MODELS = ("ragged llama", "classifier", "encoder-decoder", "torch encoder", "two calls")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(ShapleyMarginals, "permutations", 2)
    monkeypatch.setattr(MaskTrials, "trials", 6)
    monkeypatch.setattr(IntegratedGradients, "points", 3)


def mean_loss_without(model, loss_fn, batch, removed: dict[str, set[int]]) -> float:
    heads = {site.name: range(site.head_map.query_heads) for site in attention_sites(model)}
    keep = {name: [head for head in heads[name] if head not in gone] for name, gone in removed.items()}
    with torch.no_grad(), gated(model, keep):
        return float((loss_fn or OwnLoss())(model, batch).double().mean())


@pytest.mark.parametrize("case", MODELS)
def test_ablation_is_the_rise_of_the_loss_without_the_head(case):
    model, loss_fn, batch = CASES[case][0]()
    scores = scoring.score(model, [batch], "ablation", loss_fn=loss_fn)
    dense = mean_loss_without(model, loss_fn, batch, {})
    for name, found in scores.items():
        expected = [mean_loss_without(model, loss_fn, batch, {name: {head}}) - dense for head in range(len(found))]
        assert torch.allclose(found, torch.tensor(expected), rtol=1e-3, atol=1e-5)


def test_ablation_of_batches_is_the_mean_over_their_samples():
    model, loss_fn, batch = on_states(Layers(2))
    parts = [batch[:1], batch[1:]]
    whole = scoring.score(model, [batch], "ablation", loss_fn=loss_fn)
    for name, found in scoring.score(model, parts, "ablation", loss_fn=loss_fn).items():
        assert torch.allclose(found, whole[name], rtol=1e-4, atol=1e-6)


def value_table() -> dict[frozenset, float]:
    """A game of 4 heads: the loss without each set of heads."""
    generator = torch.Generator().manual_seed(0)
    sets = [frozenset(some) for size in range(5) for some in itertools.combinations(range(4), size)]
    return {some: float(torch.rand((), generator=generator, dtype=torch.float64)) + len(some) for some in sets}


def exact_shapley(table: dict[frozenset, float]) -> torch.Tensor:
    values = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        for place, head in enumerate(order):
            values[head] += (table[frozenset(order[: place + 1])] - table[frozenset(order[:place])]) / math.factorial(4)
    return values


def table_losses(table: dict[frozenset, float]):
    return lambda masks: torch.tensor([table[frozenset((row == 0).nonzero().flatten().tolist())] for row in masks])


def test_sampled_marginals_average_to_the_exact_shapley_values():
    table = value_table()
    marginals = permutation_marginals(table_losses(table), table[frozenset()], 4, 4000, torch.Generator().manual_seed(1))
    error = marginals.std(dim=0) / math.sqrt(len(marginals))
    assert ((marginals.mean(dim=0) - exact_shapley(table)).abs() < 4 * error).all()
    assert torch.allclose(marginals.sum(dim=1), torch.tensor(table[frozenset(range(4))] - table[frozenset()]).double())


def test_truncated_orders_share_what_is_left_evenly():
    saturating = lambda masks: torch.tensor([min(3.0, float((row == 0).sum())) for row in masks])  # noqa: E731
    calls = []
    counted = lambda masks: (calls.append(len(masks)), saturating(masks))[1]  # noqa: E731
    marginals = permutation_marginals(counted, 0.0, 40, 3, torch.Generator().manual_seed(0), stop=0.01)
    assert sum(calls) == 1 + 3 * 5
    assert torch.allclose(marginals.sum(dim=1), torch.full((3,), 3.0, dtype=torch.float64))
    assert (marginals != 0).sum(dim=1).tolist() == [3, 3, 3]


def test_heads_behind_the_cut_of_an_order_share_the_rest_of_the_loss():
    """40 heads, of which the first three cost 1 and each one 0.001 besides: what is left after a block of 5 is 35 times that."""
    nearly_saturating = lambda masks: torch.tensor([min(3, int((row == 0).sum())) + 1e-3 * int((row == 0).sum()) for row in masks])  # noqa: E731
    marginals = permutation_marginals(nearly_saturating, 0.0, 40, 3, torch.Generator().manual_seed(0), stop=0.02)
    expected = torch.tensor([1e-3] * 37 + [1.001] * 3, dtype=torch.float64)
    for order in marginals:
        assert torch.allclose(order.sort().values, expected, atol=1e-6)


def test_the_interval_of_equal_orders_is_that_of_a_mean():
    """mean +- z s / sqrt(n), s the sample deviation; z of 95 % is 1.959964."""
    model, loss_fn, batch = on_states(Layers(1))
    observed = next(iter(scoring.observe(model, [batch], {"shapley"}, loss_fn=loss_fn).values()))
    rows = torch.randn(7, observed.shape.head_map.query_heads, generator=torch.Generator().manual_seed(0))
    low, high = shapley_interval(replace(observed, shapley=rows, shapley_samples=torch.full((7,), 3.0)))
    half = 1.959964 * rows.std(dim=0, correction=1) / math.sqrt(7)
    assert torch.allclose(low, rows.mean(dim=0) - half, atol=1e-5)
    assert torch.allclose(high, rows.mean(dim=0) + half, atol=1e-5)
    alone = shapley_interval(replace(observed, shapley=rows[:1], shapley_samples=torch.ones(1)))
    assert all(bound.isnan().all() for bound in alone)


def test_shapley_scores_of_a_model_are_exact_over_all_orders(monkeypatch):
    """Enough random orders come near the enumeration of all, and the interval says how near."""
    torch.manual_seed(0)
    model, loss_fn, batch = on_states(Layers(1))
    monkeypatch.setattr(ShapleyMarginals, "permutations", 300)
    monkeypatch.setattr(ShapleyMarginals, "stop", 0.0)
    name = attention_sites(model)[0].name
    sets = [frozenset(some) for size in range(5) for some in itertools.combinations(range(4), size)]
    exact = exact_shapley({some: mean_loss_without(model, loss_fn, batch, {name: some}) for some in sets}).float()
    observed = scoring.observe(model, [batch], {"shapley"}, loss_fn=loss_fn)
    low, high = shapley_interval(observed[name], confidence=0.9999)
    assert ((low <= exact) & (exact <= high)).all()
    assert torch.allclose((low + high) / 2, scoring.score_observations(observed, "shapley")[name], atol=1e-6)
    assert float((high - low).max()) < float(exact.abs().max())


def test_shapley_weighs_orders_by_their_samples():
    model, loss_fn, batch = on_states(Layers(1))
    observed = [scoring.observe(model, [part], {"shapley"}, loss_fn=loss_fn) for part in (batch[:1], batch[1:])]
    single = [scoring.score_observations(part, "shapley") for part in observed]
    both = scoring.score_observations(observed[0] + observed[1], "shapley")
    for name, found in both.items():
        assert torch.allclose(found, (single[0][name] + 2 * single[1][name]) / 3, atol=1e-6)


def test_regression_recovers_a_linear_loss():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(20, generator=generator, dtype=torch.float64)
    removed = (torch.rand(60, 20, generator=generator, dtype=torch.float64) < 0.2).double()
    weights = torch.rand(60, generator=generator, dtype=torch.float64) + 0.5
    assert torch.allclose(ridge(removed, removed @ planted + 7, weights), planted, atol=1e-4)
    noisy = removed @ planted + 0.1 * torch.randn(60, generator=generator, dtype=torch.float64)
    assert (ridge(removed, noisy, weights) - planted).abs().max() < 0.2


@pytest.mark.parametrize("seed", range(12))
def test_the_ridge_is_the_one_of_least_generalised_cross_validation(seed):
    """Brute force: each ridge solved with an intercept that is not shrunk, its degrees of freedom the trace of its hat matrix."""
    generator = torch.Generator().manual_seed(seed)
    count, features = 14, 9
    x = (torch.rand(count, features, generator=generator, dtype=torch.float64) < 0.4).double()
    y = x @ torch.randn(features, generator=generator, dtype=torch.float64) + 3
    y = y + torch.randn(count, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) * 4 + 0.1
    w = torch.diag(count * weights / weights.sum())
    mean = (w @ x).sum(dim=0) / count
    size = torch.trace((x - mean).T @ w @ (x - mean)) / features
    padded = torch.cat([x, torch.ones(count, 1, dtype=torch.float64)], dim=1)
    found = []
    for ridge_of_mean in torch.logspace(-6, 2, 25, dtype=torch.float64):
        penalty = torch.diag(torch.cat([torch.full((features,), float(ridge_of_mean * size)), torch.zeros(1)])).double()
        solving = torch.linalg.solve(padded.T @ w @ padded + penalty, padded.T @ w)
        residual, freedom = y - padded @ (solving @ y), torch.trace(padded @ solving)  # the intercept is one degree of freedom
        found.append((float(residual @ w @ residual / (count - freedom) ** 2), (solving @ y)[:features]))
    assert torch.allclose(ridge(x, y, weights), min(found, key=lambda one: one[0])[1], atol=1e-8)


def test_regression_of_a_model_is_the_ridge_of_its_own_trials():
    model, batches = llama(), [{"input_ids": tokens(n, 8, n), "labels": tokens(n, 8, n)} for n in (2, 3)]
    observed = scoring.observe(model, batches, {"mask_trials"})
    names = list(observed)
    masks = torch.cat([observed[name].trial_masks for name in names], dim=1)
    assert masks.shape == (12, 16)
    for row, (batch, mask) in enumerate(zip([batches[0]] * 6 + [batches[1]] * 6, masks)):
        removed = dict(zip(names, [set((part == 0).nonzero().flatten().tolist()) for part in mask.split(8)]))
        change = mean_loss_without(model, None, batch, removed) - mean_loss_without(model, None, batch, {})
        assert float(observed[names[0]].trial_changes[row]) == pytest.approx(change, abs=1e-5)
    assert observed[names[0]].trial_samples.tolist() == [2.0] * 6 + [3.0] * 6
    scores = scoring.score_observations(observed, "regression")
    expected = ridge(1 - masks.double(), observed[names[0]].trial_changes.double(), observed[names[0]].trial_samples.double())
    assert torch.allclose(torch.cat([scores[name] for name in names]), expected.float())


@pytest.mark.parametrize("case", MODELS)
def test_integrated_gradients_are_the_gauss_legendre_sum_of_autograds(case):
    model, loss_fn, batch = CASES[case][0]()
    sites = attention_sites(model)
    grads = {site.name: [] for site in sites}
    for alpha in (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5):  # Abramowitz and Stegun 1964, table 25.4, moved to 0 .. 1
        gates, handles = {}, []
        for site in sites:
            gates[site.name] = torch.full((site.head_map.query_heads,), float(alpha), requires_grad=True)
            gate = lambda module, args, gate=gates[site.name], site=site: args[0] * gate[site.head_of_column()]  # noqa: E731
            handles.append(site.output.module.register_forward_pre_hook(gate))
        (loss_fn or OwnLoss())(model, batch).mean().backward()
        for handle in handles:
            handle.remove()
        for name, gate in gates.items():
            grads[name].append(gate.grad)
    scores = scoring.score(model, [batch], "integrated_gradient", loss_fn=loss_fn)
    for name, found in scores.items():
        expected = -(5 * grads[name][0] + 8 * grads[name][1] + 5 * grads[name][2]) / 18
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_integrated_gradients_sum_to_what_all_heads_are_worth(monkeypatch):
    monkeypatch.setattr(IntegratedGradients, "points", 9)
    model, batch = bert(), {"input_ids": tokens(3, 6)}
    loss_fn = lambda model, batch: model(**batch).last_hidden_state[..., :5].pow(3).mean(dim=(1, 2))  # noqa: E731
    everything = {site.name: set(range(site.head_map.query_heads)) for site in attention_sites(model)}
    lost = mean_loss_without(model, loss_fn, batch, everything) - mean_loss_without(model, loss_fn, batch, {})
    scores = scoring.score(model, [batch], "integrated_gradient", loss_fn=loss_fn)
    assert float(sum(found.sum() for found in scores.values())) == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("need", NEEDS)
def test_merging_parts_equals_one_pass(need, tmp_path):
    model, batches = llama(), [{"input_ids": tokens(n, 8, n), "labels": tokens(n, 8, n)} for n in (2, 3, 1)]
    whole = scoring.observe(model, batches, {need})
    merged = scoring.observe(llama(), batches[:1], {need}) + scoring.observe(llama(), batches[1:], {need})
    merged.save(tmp_path / "merged.safetensors")
    again = scoring.Observations.load(tmp_path / "merged.safetensors")
    fields = [name for name in vars(whole["model.layers.0.self_attn"]) if name.startswith((need.removesuffix("s"), "trial"))]
    assert fields
    for name, site in whole.items():
        for field in fields:
            if getattr(site, field) is not None:
                assert torch.allclose(getattr(site, field), getattr(again[name], field), rtol=1e-4, atol=1e-6)


def test_trials_of_a_batch_that_leaves_a_site_out_draw_its_heads_all_the_same():
    """As if all of them had gone, they would carry what such batches differ by from the others."""
    model, loss_fn, states = on_states(Layers(2))
    both = model.forward

    def some(model, batch):
        first = lambda states: states + model.layers[0](states, states, states, need_weights=False)[0]  # noqa: E731
        model.forward = both if batch["both"] else first
        return loss_fn(model, batch["states"])

    observed = scoring.observe(model, [{"states": states, "both": both} for both in (True, False)], {"mask_trials"}, loss_fn=some)
    for masks in observed["layers.1"].trial_masks.split(6):
        assert 0 < masks.mean() < 1


@pytest.mark.parametrize("need", NEEDS)
def test_sites_that_are_not_reached_are_told(need):
    model, loss_fn, batch = on_states(Layers(2))
    model.forward = lambda states: states + model.layers[0](states, states, states, need_weights=False)[0]
    with pytest.raises(InvalidInput, match=r"layers\.1 not reached"):
        scoring.observe(model, [batch], {need}, loss_fn=loss_fn)
    kept = scoring.observe(model, [batch], {need}, loss_fn=loss_fn, unreached="keep")
    assert [site.reached for site in kept.values()] == [True, False]


@pytest.mark.parametrize("criterion", ["ablation", "shapley", "regression", "integrated_gradient"])
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"batches": [torch.full((2, 3, 16), float("nan"))]}, "NaN"),
        ({"batches": []}, "calibration set is empty"),
        ({"loss_fn": None, "batches": [3]}, "expected a dict"),
    ],
)
def test_bad_input_is_named(criterion, arguments, names):
    given = {"batches": [torch.ones(2, 3, 16)], "loss_fn": squares, **arguments}
    with pytest.raises(InvalidInput, match=names):
        scoring.score(Layers(1), given["batches"], criterion, loss_fn=given["loss_fn"])


def test_a_loss_that_keeps_no_graph_is_told():
    model, _, batch = on_states(Layers(1))
    with pytest.raises(InvalidInput, match="does not depend on any attention head"):
        scoring.score(model, [batch], "integrated_gradient", loss_fn=lambda model, batch: squares(model, batch).detach())
