import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

from headprune.models.calls import watching_calls


class Refusing(nn.Module):
    def forward(self, states):
        raise ValueError("no")


class Trying(nn.Module):
    """Does without what fails, as models do that try a faster way first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Refusing(), nn.Identity()

    def forward(self, states):
        try:
            return self.first(states) + 1
        except ValueError:
            return self.second(states) * 2


def test_calls_end_in_order_and_one_that_fails_never_does():
    model, told = nn.Sequential(Trying(), nn.Tanh()), []
    trying, tanh = model
    with watching_calls(
        {model, trying, trying.first, trying.second, tanh},
        lambda module, args: told.append(("begins", module)) or module,
        lambda module, result: told.append(("ends", module)),
    ):
        model(torch.ones(2))
    assert told == [
        ("begins", model), ("begins", trying), ("begins", trying.first), ("begins", trying.second), ("ends", trying.second),
        ("ends", trying), ("begins", tanh), ("ends", tanh), ("ends", model),
    ]  # fmt: skip


def test_other_modules_are_not_watched_and_nothing_stays_behind_an_error():
    model, results = nn.Sequential(nn.Tanh(), Refusing()), []
    with pytest.raises(ValueError, match="no"), watching_calls({model[0]}, lambda *_: 7, lambda *given: results.append(given)):
        model(torch.zeros(2))
    assert [(given, result.tolist()) for given, result in results] == [(7, [0.0, 0.0])]
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_the_result_is_that_of_forward_before_the_modules_own_hooks():
    model, results = nn.Identity(), []
    model.register_forward_hook(lambda _module, _args, result: result * 3)
    with watching_calls({model}, lambda *_: None, lambda _, result: results.append(result)):
        assert model(torch.ones(1)) == 3
    assert results == [torch.ones(1)]
