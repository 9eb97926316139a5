"""What a caller may give as batches, and what is said where it cannot be used."""

import numpy
import pytest
import torch
from tiny_models import PoolingByAttention, llama, tokens
from transformers import BatchEncoding

import headprune as hp

KEEP = {"model.layers.0.self_attn": [0, 3, 5], "model.layers.1.self_attn": [1, 2, 7]}
BATCHES = [{"input_ids": rows, "labels": rows} for rows in tokens(60, 12).split(6)]


def test_what_a_tokenizer_gives_is_a_batch():
    encoded = [BatchEncoding(batch) for batch in BATCHES]
    for criterion in ("fisher", "output_norm"):
        scores, expected = hp.score(llama(), encoded, criterion), hp.score(llama(), BATCHES, criterion)
        assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "is None; expected a list of batches"),
        (BATCHES[0], "is one dict; expected a list of batches: put it into one"),
        (BATCHES[0]["input_ids"], "is one Tensor; expected a list of batches"),
        (["a text"], r"a batch is a str; expected a dict for model\(\*\*batch\)"),
        ([(BATCHES[0]["input_ids"],)], r"a batch is a tuple; expected a dict for model\(\*\*batch\)"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], r"input_ids of a batch is a list; expected a tensor \[batch"),
        (
            [{"input_ids": numpy.ones((2, 3), int), "labels": torch.ones(2, 3).long()}],
            "input_ids of a batch is a ndarray; expected",
        ),
        ([{"input_ids": torch.ones(3).long(), "labels": torch.ones(3).long()}], r"has the shape \[3\]; expected \[batch, tokens\]"),
    ],
)
def test_other_things_are_refused_by_every_reader(batches, message):
    scores = hp.score(llama(), BATCHES)
    readers = [
        lambda model: hp.score(model, batches),
        lambda model: hp.score(model, batches, "output_norm"),
        lambda model: hp.search_plan(model, scores, hp.Budget(heads=0.5), batches),
        lambda model: hp.recover(model, batches, steps=1),
    ]
    if batches is not None:
        readers.append(lambda model: hp.prune(model, hp.PruningPlan.from_keep(model, KEEP), batches))
    for read in readers:
        with pytest.raises(hp.InvalidInput, match=message):
            read(llama())


def test_batches_that_are_tensors_are_trained_on():
    torch.manual_seed(0)
    model, batches = PoolingByAttention(), [torch.randn(4, 5, 16)] * 3
    found = hp.recover(model, batches, loss_fn=lambda model, batch: model(batch).square().mean(dim=1), steps=3, lr=1e-2)
    assert found.losses[-1][1] < found.losses[0][1]


def test_names_that_the_forward_does_not_take_are_told_with_the_way_out():
    batches, scores = [{"inputs": torch.randn(4, 5, 16), "labels": torch.zeros(4)}], hp.score(PoolingByAttention(), (), "random")
    plan, message = (
        hp.plan(scores, hp.Budget(heads=0.5)),
        r"PoolingByAttention does not take a batch of inputs, labels as model\(\*\*b",
    )
    with pytest.raises(hp.InvalidInput, match=f"{message}.* Give loss_fn"):
        hp.score(PoolingByAttention(), batches)
    with pytest.raises(hp.InvalidInput, match=f"{message}.* Give forward"):
        hp.prune(PoolingByAttention(), plan, batches)


def test_an_error_inside_a_model_stays_what_it_is():
    class Wrong(PoolingByAttention):
        def forward(self, x):
            return super().forward(x, x)

    with pytest.raises(TypeError, match="positional arguments"):
        hp.score(Wrong(), [{"x": torch.randn(4, 5, 16)}])
