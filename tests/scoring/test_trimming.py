"""Padding that all samples of a batch share is left out of the one pass, where that changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import bert, llama, tokens

import headprune as hp
from headprune.scoring import observe

NEEDS = {"gate_gradient", "gram", "attention"}
LENGTH, LONGEST = 24, 7


def batches_for(count: int = 3, length: int = LENGTH) -> list[dict]:
    found = []
    for seed in range(count):
        mask = (torch.arange(length) < torch.tensor([LONGEST, 4, 2])[:, None]).long()
        ids = tokens(3, LONGEST, seed)
        found.append({"input_ids": F.pad(ids, (0, length - LONGEST)), "attention_mask": mask})
    return found


def with_labels(batches: list[dict]) -> list[dict]:
    return [{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in batches]


def pooled_loss(model, batch):
    """Per sample, of the mean over its tokens."""
    mask = batch["attention_mask"][..., None]
    states = model(**batch).last_hidden_state
    return ((states * mask).sum(dim=1) / mask.sum(dim=1)).square().sum(dim=1)


def places(model) -> list[int]:
    """The length of every batch that `model` runs from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    return seen


def assert_same(found, expected) -> None:
    for name, site in expected.items():
        for field, value in vars(site).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(found[name], field), value, rtol=1e-4, atol=1e-6, msg=f"{name} {field}")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_observed_is_that_of_batches_without_the_padding(family):
    model = bert() if family == "bert" else llama()
    loss = {"loss_fn": pooled_loss} if family == "bert" else {}
    padded, short = batches_for(), batches_for(length=LONGEST)
    if family == "llama":
        padded, short = with_labels(padded), with_labels(short)
    expected = observe(model, short, NEEDS, **loss)
    seen = places(model)
    found = observe(model, padded, NEEDS, **loss)
    assert seen == [LENGTH, LONGEST, *[LONGEST] * 3]  # the first batch as it is, the same trimmed, then all
    assert_same(found, expected)
    assert found.seen != expected.seen  # batches are known again by what was given


def test_losses_with_heads_removed_are_those_of_batches_without_the_padding():
    model = bert()
    expected = hp.score(model, batches_for(length=LONGEST), "ablation", loss_fn=pooled_loss)
    seen = places(model)
    found = hp.score(model, batches_for(), "ablation", loss_fn=pooled_loss)
    assert seen.count(LENGTH) == 1
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=1e-3, atol=1e-6)


def test_a_batch_with_little_padding_is_not_tried():
    model = bert()
    seen = places(model)
    observe(model, batches_for(length=LONGEST + 2), {"gate_gradient"}, loss_fn=pooled_loss)
    assert seen == [LONGEST + 2] * 3


def mean_over_all_places(model, batch):
    return model(**batch).last_hidden_state.square().mean(dim=(1, 2))


def of_full_length(model, batch):
    return (model(**batch).last_hidden_state * torch.ones(LENGTH, 1)).sum(dim=(1, 2))


def without_the_mask(model, batch):
    return model(input_ids=batch["input_ids"]).last_hidden_state[:, 0].square().sum(dim=1)


@pytest.mark.parametrize("loss", [mean_over_all_places, of_full_length, without_the_mask])
def test_batches_stay_whole_where_padding_makes_a_difference(loss):
    model = bert()
    seen = places(model)
    observe(model, batches_for(), {"gate_gradient"}, loss_fn=loss)
    assert seen[-3:] == [LENGTH] * 3
    assert seen.count(LONGEST) == 1


def test_batches_stay_whole_under_a_mask_of_the_user_s():
    model = bert()
    seen = places(model)
    observe(model, batches_for(), {"gram"}, loss_fn=pooled_loss, token_mask=lambda batch: torch.ones(3, LENGTH))
    assert seen == [LENGTH] * 3


def test_an_error_in_the_loss_is_the_user_s_own():
    def broken(model, batch):
        raise KeyError("a label that is not there")

    with pytest.raises(KeyError, match="a label that is not there"):
        observe(bert(), batches_for(), {"gate_gradient"}, loss_fn=broken)
