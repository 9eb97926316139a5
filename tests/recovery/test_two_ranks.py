"""Scoring and recovery on two gloo ranks give what one rank gives, on each of them."""

import json

import pytest
import torch
from child_process import by_two_ranks
from pruned_pairs import pruned_llama, text_batches
from safetensors.torch import load_file
from two_ranks import BUDGET, CRITERIA, observed, steps_of

import headprune as hp


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    return by_two_ranks("two_ranks.py", tmp_path_factory, worker_id)


def said(folder, rank):
    return json.loads((folder / f"said{rank}.json").read_text())


@pytest.mark.parametrize("way", ["shared", "own"])
def test_ranks_observe_what_one_does(folder, way):
    expected = observed(text_batches(5))
    for rank in (0, 1):
        found = hp.Observations.load(folder / f"{way}{rank}.safetensors")
        assert found.seen == expected.seen
        for criterion in CRITERIA:
            scores, by_one = (hp.score_observations(some, criterion) for some in (found, expected))
            for name in by_one:
                torch.testing.assert_close(scores[name], by_one[name], rtol=1e-6, atol=1e-9)
    first, second = (load_file(folder / f"{way}{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_every_rank_makes_the_plan_of_one(folder):
    expected = hp.plan(hp.score_observations(observed(text_batches(5)), "fisher"), BUDGET)
    assert [hp.PruningPlan.load(folder / f"plan{rank}.json").keep for rank in (0, 1)] == [expected.keep] * 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("different", "the ranks were given different batches"),
        ("too few", "1 batches for 2 ranks"),
        ("nan", "NaN or infinite"),
        ("own data", "the ranks were asked for different things (train: '6 batches"),
        ("own steps", "(steps: 2 of rank 0, 3 of rank 1)"),
        ("own folder", "(output_dir: 'not given' of rank 0, 'given' of rank 1)"),
    ],
)
def test_no_rank_is_left_waiting(folder, case, message):
    assert all(message in said(folder, rank)[case] for rank in (0, 1))


def test_recovery_on_two_ranks_is_that_of_batches_twice_as_large(folder):
    dense, model = pruned_llama()
    alone = hp.recover(
        model, text_batches(6), text_batches(3), teacher=dense, steps=6, lr=1e-3, gradient_accumulation_steps=2
    )  # fmt: skip
    for rank in (0, 1):
        found = load_file(folder / f"model{rank}.safetensors")
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        recovery = said(folder, rank)["recovery"]
        assert said(folder, rank)["again"]["evaluations"] == recovery["evaluations"]
        torch.testing.assert_close(torch.tensor(recovery["evaluations"]), torch.tensor(alone.evaluations), rtol=1e-4, atol=1e-5)


def test_a_loop_of_ones_own_under_fsdp2_is_that_of_batches_twice_as_large(folder):
    dense, model = pruned_llama()
    objective, batches = hp.recovery.Objective(model, teacher=dense), text_batches(6)
    with objective.ready(torch.device("cpu"), batches[0]):
        steps_of(model, objective, [batches[start : start + 2] for start in (0, 2, 4)])
    found = load_file(folder / "sharded.safetensors")
    assert set(found) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_nan_on_one_rank_stops_both_at_the_same_step(folder):
    for rank in (0, 1):
        assert said(folder, rank)["broken"].startswith("the loss is NaN or infinite at step 4;")
