import copy

import pytest
import torch
from torch import nn

from headprune.nn import linear
from headprune.nn.linear import through_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture(autouse=True)
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "beats_mkl", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the input of each product that oneDNN made."""
    seen: list[tuple[int, ...]] = []
    product = linear.product
    monkeypatch.setattr(linear, "product", lambda x, weight, bias: (seen.append(tuple(x.shape)), product(x, weight, bias))[1])
    return seen


def large(bias: bool = True) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 130, bias=bias), nn.GELU(), nn.Linear(130, 96, bias=bias)), torch.randn(3, 37, 96)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_(True), *(p for p in model.parameters() if p.requires_grad)]
    out = model(inputs[0])
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_outputs_and_gradients_are_those_of_fp64_as_closely_as_pytorch_gets(bias, frozen, calls):
    model, x = large(bias)
    model.requires_grad_(not frozen)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    plain = gradients(model, x)
    with through_onednn(model):
        found = gradients(model, x)
    assert len(calls) == 4
    assert len(found) == len(exact)
    for mine, theirs, right in zip(found, plain, exact):
        assert mine.shape == right.shape
        assert error(mine, right) <= 4 * error(theirs, right) + 1e-7


def test_gradients_can_be_differentiated_again():
    model, x = large()
    x.requires_grad_(True)

    def penalty() -> torch.Tensor:
        (of_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(of_x.square().sum(), x)[0]

    expected = penalty()
    with through_onednn(model):
        torch.testing.assert_close(penalty(), expected, rtol=1e-4, atol=1e-3)


def test_a_copy_made_inside_runs_with_its_own_weights():
    model, x = large()
    with through_onednn(model), torch.no_grad():
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(x).any()
        assert model(x).any()


def test_weights_that_change_inside_are_the_ones_that_run():
    model, x = large()
    with through_onednn(model), torch.no_grad():
        model[2].weight = nn.Parameter(model[2].weight[:50].clone())
        model[2].bias = None
        assert model(x).shape == (3, 37, 50)


def test_afterwards_and_inside_a_second_block_the_layers_are_as_they_were():
    model, _ = large()
    own = nn.Linear.forward
    with through_onednn(model):
        with through_onednn(model):
            assert "forward" in vars(model[0])
        assert "forward" in vars(model[0])
    assert "forward" not in vars(model[0])
    assert type(model[0]).forward is own


def test_layers_with_a_forward_of_their_own_keep_it():
    model, x = large()
    model[2].forward = lambda x: x + 1
    with through_onednn(model):
        assert model[2](x).equal(x + 1)
    assert model[2](x).equal(x + 1)


def test_other_dtypes_autocast_small_inputs_transforms_and_compiled_models_run_as_ever(calls):
    model, x = large()
    with through_onednn(model):
        assert model.double()(x.double()).dtype == torch.float64
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        model(x[:1, :2])
        model(x[:0])
        model(x[0, 0])
        torch.vmap(model)(x)
        torch.compile(model, backend="eager", fullgraph=True)(x)
        assert calls == []
        model(x)
        assert len(calls) == 2


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(linear, "beats_mkl", lambda: False)
    model, _ = large()
    with through_onednn(model):
        assert "forward" not in vars(model[0])


def test_weights_and_inputs_may_lie_anyhow():
    torch.manual_seed(0)
    model, x = nn.Linear(96, 130), torch.randn(96, 111).t()
    model.weight.data, model.bias.data = torch.randn(96, 260).t()[::2], torch.randn(260)[::2]
    exact = gradients(copy.deepcopy(model).double(), x.double())
    with through_onednn(model):
        assert all(error(one, other) < 1e-6 for one, other in zip(gradients(model, x), exact, strict=True))
