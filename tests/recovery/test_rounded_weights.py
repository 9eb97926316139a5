"""Passes see the weights that quantise would give; what is learnt are the weights behind them."""

import copy

import pytest
import torch
from pruned_pairs import padded_batches, pruned_bert, pruned_classifier, pruned_llama, text_batches
from tiny_models import hidden, tokens
from torch import nn

import headprune as hp
from headprune.errors import InvalidInput
from headprune.recovery import rounded_weights
from headprune.recovery.quantise import in_seven_bits
from headprune.recovery.rounded_weights import fake_quantiser

pytest.importorskip("torchao")
PLAIN = (nn.Parameter, type(None))


def quantised(model, form, group=32):
    found = copy.deepcopy(model)
    hp.recovery.quantise(found, form, group=group)
    return found


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_passes_compute_what_the_quantised_model_computes(form):
    _, model = pruned_bert()
    plain = hidden(model, input_ids=tokens())
    with rounded_weights(model, form, group=8) as names:
        inside = hidden(model, input_ids=tokens())
    other = quantised(model, form, group=8)
    assert set(names) == {name for name, module in other.named_modules() if type(getattr(module, "weight", None)) not in PLAIN}
    torch.testing.assert_close(inside, hidden(other, input_ids=tokens()), rtol=1e-5, atol=1e-5)
    assert float((plain - inside).abs().max()) > 1e-3
    torch.testing.assert_close(hidden(model, input_ids=tokens()), plain, rtol=0, atol=0)


@torch.no_grad()
def test_torchs_own_layers_are_rounded_without_gradients_too():
    """Where they would run their fused kernel, which reads the weights themselves."""
    dense, _, batches, _ = pruned_classifier()
    with rounded_weights(dense, "int8"):
        inside = dense(batches[0][0])
    torch.testing.assert_close(inside, quantised(dense, "int8")(batches[0][0]), rtol=1e-5, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_layer_computes_what_it_will_in_w8a8():
    """Layer by layer: the largest of a row lies between two numbers, so that the last bit of an input may move it by a step."""
    _, model = pruned_bert()
    other = quantised(model, "w8a8")
    with rounded_weights(model, "w8a8") as names:
        for name in names:
            layer = model.get_submodule(name)
            x = torch.randn(2, 5, layer.in_features)
            torch.testing.assert_close(layer(x), other.get_submodule(name)(x), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_are_rounded_to_the_same():
    layer = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16))
    weight = layer[0].weight.detach()
    assert torch.equal(fake_quantiser("int4", 32)(weight), quantised(layer, "int4")[0].weight.dequantize())
    apart = (fake_quantiser("int8", 32)(weight).float() - quantised(layer, "int8")[0].weight.dequantize().float()).abs()
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert bool((apart <= 1.1 * step).all())  # what lies between two numbers may go to either
    assert float(apart.mean() / step.mean()) < 0.1


def test_gradients_pass_the_rounding():
    """Of a linear layer's weight: the outer product of what came in and the gradient of what went out, rounding or not; but the
    largest of a group, which may be beyond the largest number, may get none."""
    layer = nn.Sequential(nn.Linear(32, 5))
    x, of_output = torch.randn(7, 32), torch.randn(7, 5)
    with rounded_weights(layer, "int4"):
        layer(x).backward(of_output)
    size = layer[0].weight.detach().abs()
    inside = size < size.amax(dim=1, keepdim=True)
    torch.testing.assert_close(layer[0].weight.grad[inside], (of_output.t() @ x)[inside])


def test_gradients_pass_the_rounding_of_activations():
    """Of the inputs: the gradient of what went out, through the rounded weights."""
    layer = nn.Sequential(nn.Linear(32, 5))
    x, of_output = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 7, 5)
    with rounded_weights(layer, "w8a8"):
        layer(x).backward(of_output)
        assert layer(x[:0]).shape == (0, 7, 5)
    weight = fake_quantiser("int8", 32, in_seven_bits(layer))(layer[0].weight.detach())
    torch.testing.assert_close(x.grad, of_output @ weight)


@pytest.mark.parametrize(("method", "form"), [("full", "int8"), ("projections", "int8"), ("full", "w8a8")])
def test_training_for_rounded_weights_lowers_their_loss(method, form):
    _, model = pruned_llama()
    batches = text_batches()

    def loss(one):
        with torch.no_grad():
            return sum(float(one(**batch).loss) for batch in batches)

    before, rounded = loss(model), loss(quantised(model, "int4", group=8))
    types = [type(module) for module in model.modules()]
    result = hp.recover(model, batches, method=method, steps=12, lr=5e-3, quantise=form)
    assert [type(module) for module in model.modules()] == types
    assert all("forward" not in vars(module) for module in model.modules())
    assert loss(quantised(model, form)) < rounded - 0.1
    assert loss(model) < before
    assert result.steps == 12


def test_evaluations_are_of_the_rounded_weights():
    _, model = pruned_llama()
    batches = text_batches()
    start = quantised(model, "int8")
    result = hp.recover(model, batches, eval=batches, steps=2, lr=0.0, quantise="int8")
    with torch.no_grad():
        expected = -sum(float(start(**batch).loss) for batch in batches) / len(batches)
    assert result.best == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_trained_for_rounded_weights_is_told():
    _, model = pruned_bert()
    with pytest.raises(InvalidInput, match="give 'full' or 'projections'"):
        hp.recover(model, padded_batches(), method="lora", quantise="int4")
    with pytest.raises(InvalidInput, match="unknown form of weights 'int2'"):
        hp.recover(model, padded_batches(), quantise="int2")
    wrapped = model.encoder.layer[0].intermediate.dense
    wrapped.forward = lambda x: nn.functional.linear(x, wrapped.weight, wrapped.bias)
    with pytest.raises(InvalidInput, match=r"encoder.layer.0.intermediate.dense has a forward of its own"), rounded_weights(model):
        pass
