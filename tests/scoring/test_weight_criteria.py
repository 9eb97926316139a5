"""Criteria of weights and their gradients, each against its formula by plain autograd."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from weight_models import CASES, Case, head_parts

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.scoring.batch_means import over_batches

TAYLOR = ["taylor_weight", "taylor_element", "taylor_second_order", "snip"]


def mean_loss(case: Case, batch: dict) -> Tensor:
    return case.loss_fn(case.model, batch).mean() if case.loss_fn else case.model(**batch).loss


def products(case: Case, batches: list[dict], site: str | None = None) -> list[list[list[tuple[float, Tensor]]]]:
    """[batch][head][slice]: (share, w g), g the gradient of the batch's mean loss."""
    case = case if site is None else Case(case.model, site, case.loss_fn)
    found = []
    for batch in batches:
        case.model.zero_grad()
        mean_loss(case, batch).backward()
        found.append([[(share, part.double()) for share, part in head] for head in head_parts(case, lambda w: w.detach() * w.grad)])
    case.model.zero_grad()
    return found


def total(head: list[tuple[float, Tensor]], of) -> Tensor:
    return sum(share * of(part).sum() for share, part in head)


def per_batch(found, of) -> Tensor:
    """[batches, heads]"""
    return torch.stack([torch.stack([total(head, of) for head in heads]) for heads in found])


@pytest.mark.parametrize("name", CASES)
def test_taylor_criteria_follow_their_formulas(name):
    case = CASES[name]()
    batches = case.batches()
    scores = scoring.score(case.model, batches, TAYLOR, loss_fn=case.loss_fn)
    found = products(case, batches)
    dot, size, square = (per_batch(found, of) for of in (lambda p: p, torch.abs, torch.square))
    expected = {
        "taylor_weight": dot.abs().mean(0),
        "taylor_element": size.mean(0),
        "taylor_second_order": (0.5 * square.mean(0) - dot.mean(0)).abs(),
    }
    for criterion, values in expected.items():
        torch.testing.assert_close(scores[criterion][case.site].double(), values, rtol=1e-3, atol=1e-7)
    snip = torch.cat(list(scores["snip"].values()))
    assert float(snip.sum()) == pytest.approx(1.0, rel=1e-5)
    share = scores["snip"][case.site] / scores["taylor_element"][case.site]
    torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_magnitudes_follow_their_formulas_in_every_layout(name):
    case = CASES[name]()
    found = scoring.score(
        case.model, criterion=["magnitude_l1", "magnitude_l2", "magnitude_max", "magnitude_l1_mean", "magnitude_l2_mean"]
    )
    heads = head_parts(case, lambda weight: weight.detach())
    l1 = torch.stack([total(head, torch.abs) for head in heads])
    l2 = torch.stack([sum(share * part.norm() for share, part in head) for head in heads])
    count = torch.tensor([sum(share * part.numel() for share, part in head) for head in heads])
    largest = torch.stack([max(part.abs().max() for _, part in head) for head in heads])
    expected = (("l1", l1), ("l2", l2), ("max", largest), ("l1_mean", l1 / count), ("l2_mean", l2 / count))
    for criterion, values in expected:
        torch.testing.assert_close(found[f"magnitude_{criterion}"][case.site], values, rtol=1e-5, atol=0)


def test_a_batch_of_one_gives_the_products_of_that_sample():
    case = CASES["bert"]()
    (batch,) = case.batches(1, 3)
    singles = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    observed = scoring.observe(case.model, singles, {"weight_gradient"}, loss_fn=case.loss_fn)[case.site]
    assert observed.weight_gradient_dot.shape == (3, 4, 4)
    found = per_batch(products(case, singles), torch.square)
    torch.testing.assert_close(observed.weight_gradient_square.sum(1).double(), found, rtol=1e-3, atol=1e-12)


def test_a_mean_loss_and_per_sample_losses_give_the_same():
    case = CASES["bert"]()
    batches = case.batches(2)
    per_sample = scoring.observe(case.model, batches, {"weight_gradient"}, loss_fn=case.loss_fn)
    mean = scoring.observe(case.model, batches, {"weight_gradient"}, loss_fn=lambda m, b: case.loss_fn(m, b).mean())
    for name in mean:
        for field in ("weight_gradient_dot", "weight_gradient_abs", "weight_gradient_square"):
            torch.testing.assert_close(getattr(mean[name], field), getattr(per_sample[name], field), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("of_mean", [False, True])
def test_batches_count_by_their_samples(of_mean):
    """The last batch of a data set is often one of few: as a whole one it counted as much as all the others' samples."""
    case = CASES["bert"]()
    loss_fn = (lambda model, batch: case.loss_fn(model, batch).mean()) if of_mean else case.loss_fn
    (batch,) = case.batches(1, 5)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 4), slice(4, 5))]
    apart = [scoring.score(case.model, [part], TAYLOR, loss_fn=loss_fn) for part in parts]
    found = scoring.score(case.model, parts, TAYLOR, loss_fn=loss_fn)
    for name in ("taylor_weight", "taylor_element"):
        few, many = (one[name][case.site] for one in apart)
        torch.testing.assert_close(found[name][case.site], 0.8 * few + 0.2 * many, rtol=1e-4, atol=0)
    share = found["snip"][case.site] / found["taylor_element"][case.site]
    torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-4, atol=0)
    both, whole = (scoring.observe(case.model, data, {"weight_gradient"}, loss_fn=loss_fn)[case.site] for data in (parts, [batch]))
    dot = over_batches(both.weight_gradient_dot, both)  # of the same mean loss, however its samples are batched
    torch.testing.assert_close(dot, whole.weight_gradient_dot[0], rtol=1e-3, atol=1e-7)


def test_observations_without_numbers_of_samples_weigh_batches_alike():
    case = CASES["bert"]()
    observed = scoring.observe(case.model, case.batches(2), {"weight_gradient"}, loss_fn=case.loss_fn)
    old = scoring.Observations({name: replace(site, weight_gradient_samples=None) for name, site in observed.items()})
    expected = observed[case.site].weight_gradient_abs.sum(dim=1).mean(dim=0)
    torch.testing.assert_close(scoring.score_observations(old, "taylor_element")[case.site], expected)


def test_only_projections_get_gradients_and_all_is_as_before_afterwards():
    case = CASES["gpt2"]()
    batches = case.batches(1)
    parameters = dict(case.model.named_parameters())
    parameters["transformer.wte.weight"].requires_grad_(False)
    kept = torch.ones_like(parameters["transformer.h.0.attn.c_attn.weight"])
    parameters["transformer.h.0.attn.c_attn.weight"].grad = kept
    before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    seen = []

    def loss_fn(model, batch):
        seen.append({name for name, p in model.named_parameters() if p.requires_grad})
        return model(**batch).loss

    scoring.observe(case.model, batches, {"weight_gradient", "gate_gradient"}, loss_fn=loss_fn)
    own = {f"transformer.h.{layer}.attn.{part}.weight" for layer in range(2) for part in ("c_attn", "c_proj")}
    assert seen == [own]
    assert all((p.requires_grad, p.grad) == before[name] for name, p in parameters.items() if p.grad is None)
    assert parameters["transformer.h.0.attn.c_attn.weight"].grad is kept
    assert torch.equal(kept, torch.ones_like(kept))


def test_the_gradients_of_both_needs_are_those_of_each_alone():
    case = CASES["ragged llama"]()
    batches = case.batches(2)
    both = scoring.observe(case.model, batches, {"weight_gradient", "gate_gradient"})
    for need, field in (("weight_gradient", "weight_gradient_dot"), ("gate_gradient", "gate_gradient")):
        alone = scoring.observe(case.model, batches, {need})
        for name in both:
            torch.testing.assert_close(getattr(both[name], field), getattr(alone[name], field), rtol=1e-4, atol=1e-7)


def test_merging_equals_one_pass_and_samples_can_be_drawn_again():
    case = CASES["bert"]()
    batches = case.batches(4)
    observe = lambda part: scoring.observe(case.model, part, {"weight_gradient"}, loss_fn=case.loss_fn)  # noqa: E731
    whole, merged = observe(batches), observe(batches[:1]) + observe(batches[1:])
    for name in whole:
        assert torch.equal(whole[name].weight_gradient_abs, merged[name].weight_gradient_abs)
    assert scoring.ranking_stability(whole, "taylor_weight", resamples=5).spearman > 0.3
    assert scoring.score_observations(whole, "taylor_weight").spread is not None


def test_sites_that_the_loss_does_not_reach_are_named():
    case = CASES["ragged llama"]()
    first = attention_sites(case.model)[0].name

    def shallow(model, batch):
        return model.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1].square().mean()

    with pytest.raises(InvalidInput, match="not reached"):
        scoring.observe(case.model, case.batches(1), {"weight_gradient"}, loss_fn=shallow)
    observed = scoring.observe(case.model, case.batches(1), {"weight_gradient"}, loss_fn=shallow, unreached="keep")
    assert observed[first].reached
    assert not observed[case.site].reached
    assert (observed[case.site].weight_gradient_abs == 0).all()
