"""Movement of weights over training steps, against its definition."""

import pytest
import torch
from weight_models import CASES, head_parts

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.scoring import MovementRecorder


def train(case, steps: int, each=lambda: None, optimizer=None):
    """Plain gradient descent; -sum w g of every head after each backward, added up."""
    optimizer = optimizer or torch.optim.SGD(case.model.parameters(), lr=0.05)
    expected = 0.0
    for batch in case.batches(steps):
        optimizer.zero_grad()
        (case.loss_fn(case.model, batch).mean() if case.loss_fn else case.model(**batch).loss).backward()
        heads = head_parts(case, lambda w: w.detach() * w.grad)
        expected = expected - torch.stack([sum(share * part.double().sum() for share, part in head) for head in heads])
        each()
        optimizer.step()
    return expected


@pytest.mark.parametrize("name", CASES)
def test_movement_follows_its_formula(name):
    case = CASES[name]()
    recorder = MovementRecorder(case.model)
    expected = train(case, 4, recorder)
    scores = recorder.scores()
    assert scores.criterion == "movement"
    assert recorder.steps == 4
    torch.testing.assert_close(scores[case.site].double(), expected, rtol=1e-3, atol=1e-6)


def test_an_attached_optimizer_records_by_itself_until_removed():
    case = CASES["bert"]()
    recorder = MovementRecorder(case.model)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-3)
    handle = recorder.attach(optimizer)
    expected = train(case, 3, optimizer=optimizer)
    handle.remove()
    train(case, 1, optimizer=optimizer)
    assert recorder.steps == 3
    torch.testing.assert_close(recorder.scores()[case.site].double(), expected, rtol=1e-3, atol=1e-6)


def test_recording_goes_on_from_a_saved_state():
    case = CASES["bert"]()
    whole, first, second = (MovementRecorder(case.model) for _ in range(3))
    train(case, 2, lambda: (whole(), first()))
    second.load_state_dict(first.state_dict())
    train(case, 2, lambda: (whole(), second()))
    assert second.steps == 4
    assert torch.equal(second.scores()[case.site], whole.scores()[case.site])


def test_frozen_weights_do_not_move_and_scaled_gradients_are_unscaled():
    case = CASES["bert"]()
    plain, scaled = MovementRecorder(case.model), MovementRecorder(case.model)
    inner = case.model.get_submodule(case.site).self
    inner.query.weight.requires_grad_(False)
    (batch,) = case.batches(1)
    (loss,) = (case.loss_fn(case.model, batch).mean(),)
    loss.backward()
    plain()
    for parameter in case.model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 1024
    scaled(scale=1 / 1024)
    observed = plain.observations()[case.site]
    assert (observed.movement[0] == 0).all()
    assert (observed.movement[3] != 0).all()
    torch.testing.assert_close(scaled.observations()[case.site].movement, observed.movement, rtol=1e-5, atol=1e-8)


def test_movement_cannot_be_observed_and_other_states_are_refused():
    case = CASES["bert"]()
    with pytest.raises(InvalidInput, match="MovementRecorder"):
        scoring.score(case.model, case.batches(1), "movement")
    recorder = MovementRecorder(case.model)
    with pytest.raises(InvalidInput, match="no training step"):
        recorder.scores()
    with pytest.raises(InvalidInput, match="other attentions"):
        recorder.load_state_dict(MovementRecorder(CASES["gpt2"]().model).state_dict())
