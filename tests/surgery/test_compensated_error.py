import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import bert, llama, repeated, tokens
from transformers import BatchEncoding

from headprune.errors import InvalidInput, InvalidPlan
from headprune.models import attention_sites, gated
from headprune.planning import Budget, plan
from headprune.scoring import score
from headprune.surgery import compensate, cut
from headprune.surgery.compensate import resolve_outputs
from headprune.surgery.compensated_error import CompensatedError
from headprune.surgery.search_plan import first_batches, search_batches, search_plan


def batches_for(count: int) -> list[dict]:
    lengths = torch.tensor([16, 9, 12, 16, 7, 16])
    mask = (torch.arange(16) < lengths[:, None]).long()
    return [{"input_ids": tokens(6, 16, seed), "attention_mask": mask} for seed in range(count)]


def plan_of(model, *keep: list[int]) -> dict[str, list[int]]:
    return {site.name: heads for site, heads in zip(attention_sites(model), keep)}


def output_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def error_by_hand(model, plan, batches) -> float:
    """By compensating a copy and running it with the other heads off, on the held-out batch alone."""
    pruned, held_out = copy.deepcopy(model), batches[4]
    resolve_outputs(pruned, attention_sites(pruned), plan, batches)
    with gated(pruned, plan):
        found = output_of(pruned, held_out)
    dense, mask = output_of(model, held_out), held_out["attention_mask"]
    if hasattr(model, "lm_head"):
        errors = F.kl_div(found.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    else:
        errors = (found - dense).square().sum(-1) / dense.square().sum(-1).mean()
    return float(((errors * mask).sum(1) / mask.sum(1)).mean())


@pytest.mark.parametrize("make", [bert, llama, partial(repeated, bert, 2, 3), partial(repeated, llama, 2, 2)])
def test_the_error_is_that_of_the_model_compensated_for_real(make, monkeypatch):
    monkeypatch.setattr(compensate, "resolve", partial(compensate.resolve, join=False))
    model, batches = make(), batches_for(5)
    before = copy.deepcopy(model.state_dict())
    heads = attention_sites(model)[0].head_map.query_heads
    plans = [
        plan_of(model, [0, 1], [2, 3]),
        plan_of(model, [0, 1], list(range(heads))),  # shares its first layer with the one before
        plan_of(model, list(range(heads)), [0, 3]),
        plan_of(model, [1, 2], [0]),
    ]
    error = CompensatedError(model, attention_sites(model), batches)
    found = error(plans)
    assert found == pytest.approx([error_by_hand(model, plan, batches) for plan in plans], rel=1e-3)
    assert error(plans[::-1]) == found[::-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def mean_embedding(model, batch) -> torch.Tensor:
    return F.normalize((model(**batch).last_hidden_state * batch["attention_mask"][..., None]).sum(dim=1), dim=-1)


def test_models_are_compared_by_what_forward_returns(monkeypatch):
    monkeypatch.setattr(compensate, "resolve", partial(compensate.resolve, join=False))
    model, batches = bert(), batches_for(5)
    sites, keep = attention_sites(model), plan_of(model, [0, 1], [2, 3])
    pruned = copy.deepcopy(model)
    resolve_outputs(pruned, attention_sites(pruned), keep, batches)
    with torch.no_grad(), gated(pruned, keep):
        changed = mean_embedding(pruned, batches[4]) - mean_embedding(model, batches[4])
    [found] = CompensatedError(model, sites, batches, forward=mean_embedding)([keep])
    assert found == pytest.approx(float(changed.square().sum(dim=-1).mean()), rel=1e-3)
    assert found != pytest.approx(CompensatedError(model, sites, batches)([keep])[0], rel=0.1)


def all_layers(model, batch) -> torch.Tensor:
    return torch.stack(model(**batch, output_hidden_states=True).hidden_states[1:]).mean(dim=(0, 2))


def test_states_of_early_layers_count_where_forward_reads_them(monkeypatch):
    model, batches = bert(layers=3), batches_for(5)
    plans = [plan_of(model, *keep) for keep in ([[0], [0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1], [2], [1, 3]])]
    found = CompensatedError(model, attention_sites(model), batches, forward=all_layers)(plans)
    monkeypatch.setattr(compensate, "keeping_for", lambda *_: "nothing")
    whole = CompensatedError(model, attention_sites(model), batches, forward=all_layers)(plans)
    assert found == pytest.approx(whole, rel=1e-5)


def test_the_dense_model_has_no_error():
    model = bert()
    error = CompensatedError(model, attention_sites(model), batches_for(2))
    assert error([plan_of(model, [0, 1, 2, 3], [0, 1, 2, 3])])[0] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("make", [bert, llama])
def test_a_searched_plan_is_no_worse_than_the_one_by_scores_alone(make):
    model, batches = make(), batches_for(5)
    before = copy.deepcopy(model.state_dict())
    scores, budget = score(model, criterion="magnitude_l2"), Budget(heads=0.5)
    found = search_plan(model, scores, budget, batches, trials=6)
    error = CompensatedError(model, attention_sites(model), batches)
    searched, alone = error([found.plan, plan(scores, budget)])
    assert searched == pytest.approx(found.best.error, rel=1e-4)
    assert alone == pytest.approx(found.trials[0].error, rel=1e-4)
    assert searched <= alone
    assert 1 < len(found.trials) <= 6
    assert found.plan.removed_heads == found.plan.total_heads // 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InvalidInput, match="calibration set is empty"):
        search_plan(model, scores, budget, [])
    cut(model, found.plan)
    with pytest.raises(InvalidPlan, match="for another model"):
        search_plan(model, scores, budget, batches)


def test_a_search_reads_no_more_batches_than_its_tokens_ask_for():
    batches = batches_for(5)  # 96 tokens each
    assert first_batches(batches, 100) == batches[:2]
    assert first_batches(batches, 1) == batches[:2]
    assert first_batches(batches, None) == batches
    assert first_batches(iter(batches[:1]), 1) == batches[:1]


def test_where_few_batches_would_be_read_each_gives_some_of_its_samples():
    batches = batches_for(8)  # 96 tokens each
    found, every = search_batches(batches, 128)  # 768 / (1.5 * 128): every fourth sample
    assert every == 3
    assert [len(batch["input_ids"]) for batch in found] == [2, 1, 2, 1, 2, 1, 2, 1]
    samples = torch.cat([batch["input_ids"] for batch in batches])[::4]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), samples)
    assert torch.equal(found[1]["attention_mask"], batches[1]["attention_mask"][2::4])
    assert search_batches(batches, 384) == (batches[:4], 5)  # enough of them
    assert search_batches(batches, None) == (batches, 5)
    assert search_batches(batches[:2], 500) == (batches[:2], 5)  # these are all
    encodings = search_batches([BatchEncoding(batch) for batch in batches], 128)[0]
    assert torch.equal(encodings[1].input_ids, found[1]["input_ids"])  # what a tokenizer gives has attributes
    lists = [[batch["input_ids"], batch["attention_mask"]] for batch in batches]
    assert search_batches(lists, 100) == (lists[:2], 5)  # nothing says which entry is a sample's


def test_every_third_batch_is_held_out_where_that_is_asked_for():
    model, batches = bert(), batches_for(6)
    found = CompensatedError(model, attention_sites(model), batches, held_out_every=3)
    assert found._held_out == [2, 5]


def test_a_call_that_was_broken_off_leaves_no_wrong_number_behind(monkeypatch):
    model, batches = llama(layers=3), batches_for(5)
    keep = plan_of(model, [0, 1, 2, 3], [1, 4, 5], [0, 6])
    measured, fresh = (CompensatedError(model, attention_sites(model), batches) for _ in range(2))
    [expected] = fresh([keep])

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CompensatedError, "_solved", stopped)
        with pytest.raises(KeyboardInterrupt):
            measured([keep])
    assert measured([keep]) == [expected]


def test_of_two_batches_the_last_is_held_out_as_in_compensation(monkeypatch):
    monkeypatch.setattr(compensate, "resolve", partial(compensate.resolve, join=False))
    model, batches = bert(), batches_for(2)
    sites = attention_sites(model)
    plan = {site.name: [0, 1, 2] for site in sites}
    pruned = copy.deepcopy(model)
    resolve_outputs(pruned, attention_sites(pruned), plan, batches)
    with gated(pruned, plan):
        found = output_of(pruned, batches[1])
    dense, mask = output_of(model, batches[1]), batches[1]["attention_mask"]
    errors = (found - dense).square().sum(-1) / dense.square().sum(-1).mean()
    (measured,) = CompensatedError(model, sites, batches)([plan])
    assert measured == pytest.approx(float(((errors * mask).sum(1) / mask.sum(1)).mean()), rel=1e-3)
