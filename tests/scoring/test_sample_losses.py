from types import SimpleNamespace

import pytest
import torch
from masked_models import bart, bert_with, classes
from tiny_models import VOCABULARY, llama, padded, tokens
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.scoring.sample_losses import OwnLoss, next_token, token


def some_ignored(labels: torch.Tensor) -> torch.Tensor:
    """The first labels of later rows do not count: rows are means over different numbers."""
    rows, length = labels.shape
    return torch.where(torch.arange(length) < 2 * torch.arange(rows)[:, None], -100, labels)


CASES = {
    "causal": (llama, {**padded(), "labels": some_ignored(tokens())}),
    "masked": (lambda: bert_with(BertForMaskedLM), {**padded(), "labels": some_ignored(tokens())}),
    "tokens": (lambda: bert_with(BertForTokenClassification, num_labels=7), {**padded(), "labels": some_ignored(tokens() % 7)}),
    "encoder-decoder": (bart, {**padded(side="right"), "labels": some_ignored(tokens(3, 7, 5))}),
    "class": (lambda: bert_with(BertForSequenceClassification, num_labels=5), {**padded(), "labels": classes(5)}),
    "classes": (
        lambda: bert_with(BertForSequenceClassification, num_labels=4),
        {**padded(), "labels": (torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.5).float()},
    ),
    "regression": (
        lambda: bert_with(BertForSequenceClassification, num_labels=1),
        {**padded(), "labels": torch.tensor([0.2, 1.0, -1.0])},
    ),
    "regressions": (
        lambda: bert_with(BertForSequenceClassification, num_labels=2, problem_type="regression"),
        {**padded(), "labels": torch.tensor([[0.2, 1.0], [0.1, 3.0], [-1.0, 1.0]])},
    ),
    "span": (
        lambda: bert_with(BertForQuestionAnswering),
        {**padded(), "start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 8])},
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_samples_loss_is_that_of_the_sample_by_itself_and_their_mean_is_the_models(case):
    make, batch = CASES[case]
    model = make()
    losses = OwnLoss()(model, batch)
    single = [model(**{name: values[row : row + 1] for name, values in batch.items()}).loss for row in range(3)]
    assert torch.allclose(losses, torch.stack(single), rtol=1e-4)
    labels = batch.get("labels")
    counts = torch.ones(3)
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        counts = (labels[:, 1 if case == "causal" else 0 :] != -100).sum(dim=1)
    assert float((losses * counts).sum() / counts.sum()) == pytest.approx(float(model(**batch).loss), rel=1e-4)


def test_of_losses_that_lie_near_each_other_the_models_own_is_taken():
    """The wrong form, first in order, is off by less than a tolerance of 1e-3 would notice."""
    batch = {"labels": tokens(2, 4)}
    logits = torch.zeros(2, 4, VOCABULARY)
    logits[:, :3].scatter_(2, batch["labels"][:, :3, None], 1e-3)
    output = SimpleNamespace(logits=logits, loss=token(SimpleNamespace(logits=logits), batch)[0].mean())
    own = OwnLoss()
    losses = own(lambda **_: output, batch)
    assert torch.allclose(losses.mean(), output.loss, rtol=1e-7)
    assert abs(float(next_token(output, batch)[0].mean() - output.loss)) < 1e-3


def test_a_sample_without_labels_is_named():
    labels = tokens()
    labels[1] = -100
    with pytest.raises(InvalidInput, match=r"samples \[1\] of a batch have no label"):
        OwnLoss()(llama(), {"input_ids": tokens(), "labels": labels})


def test_an_unknown_loss_asks_for_loss_fn():
    model = bert_with(BertForSequenceClassification, num_labels=5)
    plain = model.forward

    def smoothed(**batch):
        output = plain(**batch)
        output.loss = 0.9 * output.loss + 0.1
        return output

    model.forward = smoothed
    with pytest.raises(InvalidInput, match=r"none that headprune knows sample by sample.*give loss_fn"):
        OwnLoss()(model, {**padded(), "labels": classes(5)})


def test_a_loss_that_is_not_finite_is_named():
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(InvalidInput, match="the loss of LlamaForCausalLM is NaN or infinite on a batch; look for empty labels"):
        OwnLoss()(model, {"input_ids": tokens(), "labels": tokens()})


@pytest.mark.parametrize("criterion", ["fisher", "ablation"])
def test_a_batch_without_a_label_that_counts_is_named(criterion):
    labels = [tokens(), torch.full_like(tokens(), -100)]
    with pytest.raises(InvalidInput, match=r"batch; none of its labels counts \(all are -100\)"):
        scoring.score(llama(), [{"input_ids": tokens(), "labels": some} for some in labels], criterion)


@pytest.mark.parametrize(("batch", "names"), [({"input_ids": tokens()}, "put labels into the batches"), (3, "a batch is a int")])
def test_no_loss_is_named(batch, names):
    with pytest.raises(InvalidInput, match=names):
        OwnLoss()(llama(), batch)


def test_a_form_that_finds_no_labels_does_not_hide_the_one_that_fits():
    """Labels in the first column alone: the next-token form has none."""
    model, labels = bert_with(BertForTokenClassification, num_labels=7), tokens() % 7
    labels[:, 1:] = -100
    batch = {**padded(), "labels": labels}
    losses = OwnLoss()(model, batch)
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
