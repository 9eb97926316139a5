"""Lottery tickets: early weights come back exactly, sliced; learning rates repeat; the control has the same heads."""

import random
import textwrap

import pytest
import torch
from child_process import killed_at
from schedule_cases import Rates, StopAt, batches, loss, short_training, tiny
from tiny_models import hidden, tokens
from torch import nn

import headprune as hp
from headprune import schedules
from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.models import attention_sites
from headprune.schedules.rewound import EarlyWeights
from headprune.surgery import cut

HALF = hp.Budget(heads=0.5)


class Noting:
    """A training that keeps the state that it begins with."""

    def __init__(self) -> None:
        self.begun = []

    def __call__(self, model, round):
        self.begun.append({name: value.clone() for name, value in model.state_dict().items()})
        short_training(model, round)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def sliced(model, plan):
    cut(model, plan, verify=False)
    return model.state_dict()


@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_rewinding_restores_exactly_the_sliced_early_weights(tmp_path, kept_in):
    training = Noting()
    folder = tmp_path / "run" if kept_in == "folder" else None
    found = schedules.lottery_ticket(tiny(), batches(), HALF, recover=training, steps=2, loss_fn=loss, folder=folder)
    assert len(training.begun) == 3
    assert same(training.begun[0], tiny().state_dict())
    assert same(training.begun[2], sliced(tiny(), found.plan))
    assert found.plan.removed_heads == 4
    assert sum(site.head_map.query_heads for site in attention_sites(found.model)) == 4


def test_an_early_checkpoint_is_what_tickets_start_from(tmp_path):
    early, training = tiny(), Noting()
    with torch.no_grad():
        for parameter in early.parameters():
            parameter.mul_(0.9)
    early.save_pretrained(tmp_path / "early")
    for source in (early, early.state_dict(), tmp_path / "early"):
        found = schedules.lottery_ticket(tiny(), batches(), HALF, recover=training, steps=1, early=source, loss_fn=loss)
        assert same(training.begun.pop(), sliced(hp.load(tmp_path / "early"), found.plan))
        assert not training.begun  # the given model is the trained one


def test_step_k_of_the_training_is_gone_back_to_with_the_rates_that_followed(tmp_path):
    rates = []
    settings = hp.RecoverySettings(steps=6, lr=1e-2, options={"callbacks": (Rates(rates),), "save_steps": 100, "dropout": False})
    options = {"recover": settings, "steps": 1, "rewind_step": 2, "loss_fn": loss}
    found = schedules.lottery_ticket(tiny(), batches(), HALF, folder=tmp_path / "run", **options)
    assert len(rates) == 6 + 4
    assert rates[6:] == pytest.approx(rates[2:6])
    trained = EarlyWeights(tiny(), tmp_path / "run").model()
    assert not same(trained.state_dict(), tiny().state_dict())
    two_steps = tiny()
    hp.recover(two_steps, batches(), loss_fn=loss, steps=6, lr=1e-2, dropout=False, callbacks=[StopAt(2)])
    assert all(torch.allclose(value, two_steps.state_dict()[name], atol=1e-6) for name, value in trained.state_dict().items())
    rates.clear()
    schedules.lottery_ticket(tiny(), batches(), HALF, rewind="learning_rate", **options)
    assert rates[6:] == pytest.approx(rates[2:6])
    assert found.plan.removed_heads == 4


def test_learning_rate_rewinding_keeps_the_weights():
    training = Noting()
    found = schedules.lottery_ticket(tiny(), batches(), HALF, recover=training, steps=1, rewind="learning_rate", loss_fn=loss)
    trained = tiny()
    trained.load_state_dict(training.begun[0])
    short_training(trained, schedules.Round(0, 0, None, batches(), loss, 0, None, None))
    assert same(training.begun[1], sliced(trained, found.plan))


def test_a_compiled_model_is_pruned_as_the_model_inside():
    options = {"recover": short_training, "steps": 1, "loss_fn": loss}
    plain, compiled = (schedules.lottery_ticket(one, batches(), HALF, **options) for one in (tiny(), torch.compile(tiny())))
    assert same(compiled.model.state_dict(), plain.model.state_dict())


def test_the_control_has_the_heads_and_fresh_weights(tmp_path):
    training = Noting()
    options = {"recover": training, "steps": 1, "control": True, "loss_fn": loss, "folder": tmp_path / "run"}
    found = schedules.lottery_ticket(tiny(), batches(), HALF, **options)
    control, ticket = training.begun[2], training.begun[1]
    assert {name: value.shape for name, value in control.items()} == {name: value.shape for name, value in ticket.items()}
    moved = [name for name, value in control.items() if value.dim() > 1 and torch.equal(value, ticket[name])]
    assert moved == []
    assert found.extras["control_quality"] < 0
    again = schedules.lottery_ticket(tiny(), batches(), HALF, **options)
    assert len(training.begun) == 3
    assert same(again.extras["control"].state_dict(), found.extras["control"].state_dict())
    assert again.extras["control_quality"] == found.extras["control_quality"]


def test_the_last_ticket_and_its_control_train_longer_than_the_whole_model():
    rounds = []
    schedules.lottery_ticket(
        tiny(), batches(), HALF, recover=lambda model, around: rounds.append(around), steps=2, control=True, loss_fn=loss
    )
    assert [around.number == around.of for around in rounds] == [False, False, True, True]


def test_fresh_weights_of_any_module_or_a_clear_refusal():
    from headprune.schedules.fresh_weights import with_fresh_weights

    layer = nn.TransformerEncoderLayer(16, 2, 8)
    new = with_fresh_weights(layer, 1)
    assert not torch.equal(new.self_attn.in_proj_weight, layer.self_attn.in_proj_weight)
    assert same(new.state_dict(), with_fresh_weights(layer, 1).state_dict())
    # As the constructor leaves it: an attention draws the weights of its parts after they have drawn them by themselves.
    assert not new.self_attn.out_proj.bias.any()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(InvalidInput, match=r"Own.*initialise"):
        with_fresh_weights(Own(), 0)
    assert with_fresh_weights(Own(), 0, lambda model: model.scale.zero_()).scale.sum() == 0


def test_bad_input_is_refused_before_training():
    nothing = lambda *_: pytest.fail("ran")  # noqa: E731
    calls = {"model": tiny(), "batches": batches(), "budget": HALF, "loss_fn": loss, "recover": nothing}
    with pytest.raises(InvalidInput, match="weight"):
        schedules.lottery_ticket(rewind="weight", **calls)
    with pytest.raises(InvalidInput, match="early="):
        schedules.lottery_ticket(rewind_step=3, **calls)
    with pytest.raises(InvalidInput, match="both say"):
        schedules.lottery_ticket(rewind_step=3, early=tiny(), **calls)
    with pytest.raises(InvalidInput, match=r"is trained again after each cut; give recover=RecoverySettings\(steps=\.\.\.\)"):
        schedules.lottery_ticket(**{**calls, "recover": None})
    with pytest.raises(InvalidInput, match="last=2 trains the last round longer"):
        schedules.lottery_ticket(rewind_step=3, **{**calls, "recover": hp.RecoverySettings(steps=6, last=2)})
    with pytest.raises(InfeasibleBudget):
        schedules.lottery_ticket(min_heads=3, **calls)
    with pytest.raises(InvalidInput, match="does not fit"):
        schedules.lottery_ticket(early=nn.Linear(3, 3), **calls)


CHILD = """
    import sys, headprune as hp
    from headprune import schedules
    from schedule_cases import batches, loss, short_training, tiny

    schedules.lottery_ticket(
        tiny(), batches(), hp.Budget(heads=0.5), steps=2, loss_fn=loss, recover=short_training, folder=sys.argv[1],
        progress=lambda title, done, total: print(title, done, flush=True), control=True,
    )
"""


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path):
    options = {"steps": 2, "loss_fn": loss, "recover": short_training, "control": True}
    expected = schedules.lottery_ticket(tiny(), batches(), HALF, **options)
    place = random.choice(["step 0", "step 1 of 2", "step 2 of 2", "control"])
    marker = f"{place}: {random.choice(['recover 2', 'measure 0'])}"
    killed_at(marker, "-c", textwrap.dedent(CHILD), str(tmp_path / "run"))
    found = schedules.lottery_ticket(tiny(), batches(), HALF, folder=tmp_path / "run", **options)
    assert found.plan.keep == expected.plan.keep, marker
    for name in ("quality", "control_quality"):
        one, other = (getattr(result, name, None) or result.extras.get(name) for result in (found, expected))
        assert one == pytest.approx(other, rel=1e-5), marker
    ids = tokens()
    assert torch.allclose(hidden(found.model, input_ids=ids), hidden(expected.model, input_ids=ids), atol=1e-5)


def test_weights_of_a_step_of_adapters_cannot_be_gone_back_to():
    training = hp.RecoverySettings(steps=4, lr=1e-3, method="lora")
    with pytest.raises(InvalidInput, match="method='lora' trains adapters"):
        schedules.lottery_ticket(tiny(), batches(), HALF, recover=training, rewind_step=2, steps=2, loss_fn=loss)
