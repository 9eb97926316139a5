"""What is read of a batch while the next one runs: as on the host, in the order of the batches."""

import pytest
import torch
from scoring.test_scores import language_batches, per_sample_loss
from tiny_models import llama

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.scoring.batch_identity import checksum
from headprune.scoring.ran_batch import RanBatch

NEEDS = {"gate_gradient", "attention"}


def infinite_at(number: int):
    """A loss that is infinite on one batch."""
    calls = iter(range(100))
    return lambda model, batch: per_sample_loss(model, batch) * (float("inf") if next(calls) == number else 1.0)


@pytest.fixture(params=[False, True])
def _under_way(request, monkeypatch):
    monkeypatch.setattr(RanBatch, "under_way", request.param)


@pytest.mark.usefixtures("_under_way")
def test_batches_are_known_in_their_order():
    batches = language_batches(3)
    observed = scoring.observe(llama(), batches, NEEDS, loss_fn=per_sample_loss)
    assert observed.seen == tuple(map(checksum, batches))


@pytest.mark.usefixtures("_under_way")
@pytest.mark.parametrize("number", [0, 2])
def test_an_infinite_loss_is_refused_also_on_the_last_batch(number):
    with pytest.raises(InvalidInput, match="NaN or infinite on a calibration batch"):
        scoring.observe(llama(), language_batches(3), NEEDS, loss_fn=infinite_at(number))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pass_on_a_gpu_finds_what_one_on_the_cpu_does():
    batches = language_batches(3)
    there = [{name: values.cuda() for name, values in batch.items()} for batch in batches]
    expected = scoring.observe(llama(), batches, NEEDS, loss_fn=per_sample_loss)
    found = scoring.observe(llama().cuda(), there, NEEDS, loss_fn=per_sample_loss)
    assert found.seen == expected.seen
    for name, site in expected.items():
        for field in ("gate_gradient", "entropy", "distance"):
            assert torch.allclose(getattr(found[name], field), getattr(site, field), rtol=1e-3, atol=1e-5), field
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        scoring.observe(llama().cuda(), there, NEEDS, loss_fn=infinite_at(1))
