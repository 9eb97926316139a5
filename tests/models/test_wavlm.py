"""WavLM: heads behind torch's own attention function, and positions that the first layer makes for all."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers
from tiny_encoders import ENCODERS, LISTENER, SIZES, sound_batch

import headprune as hp
from headprune.models.wavlm_forward import OwnWavLM
from headprune.nn.replace import own_attention
from headprune.planning import masked_fitness
from headprune.scoring.masked_losses import masked_losses
from headprune.surgery.verify import cut_error

BUCKETS = {"num_buckets": 8, "max_bucket_distance": 16}


def attentions(model) -> list:
    return [layer.attention for layer in model.wavlm.encoder.layers]


def with_heads(heads: int) -> transformers.WavLMForXVector:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 8 * heads, "num_attention_heads": heads, "num_hidden_layers": 3}
    speaker = {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8, "num_labels": 5}
    config = transformers.WavLMConfig(**sizes, **LISTENER, **BUCKETS, **speaker)
    return transformers.WavLMForXVector(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_values=sound_batch("left")["input_values"]).logits


@pytest.mark.parametrize(
    ("heads", "keep"),
    [
        (7, ([1, 4, 6], [], [5])),
        (5, ([], [0, 1, 2, 3, 4], [2, 4])),
        (1, ([], [0], [])),
        (1, ([0], [], [0])),
        (3, ([2], [0, 2], [])),
    ],
)
def test_cutting_equals_gating_for_any_number_of_heads(heads, keep):
    model = with_heads(heads)
    plan = {site.name: kept for site, kept in zip(hp.attention_sites(model), keep, strict=True)}
    dense, before = copy.deepcopy(model), logits(model)
    with hp.gated(model, plan):
        expected = logits(model)
    assert torch.equal(logits(model), before)
    hp.cut(model, plan)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2
    assert cut_error(dense, model, plan, logits) <= 1e-5


def test_inside_the_block_the_projections_are_called_and_afterwards_the_stock_forward_is_back():
    model, batch = ENCODERS["wavlm"].make(), ENCODERS["wavlm"].batch("left")
    names, before = list(model.state_dict()), model(**batch).logits
    called = []
    handle = attentions(model)[1].out_proj.register_forward_pre_hook(lambda *_: called.append(1))
    with own_attention(model):
        assert all(isinstance(attention, OwnWavLM) for attention in attentions(model))
        assert torch.allclose(model(**batch).logits, before, rtol=0, atol=1e-5)
        assert list(model.state_dict()) == names
    handle.remove()
    assert called
    assert not any(isinstance(attention, OwnWavLM) for attention in attentions(model))


def test_a_forward_that_a_tool_has_replaced_is_refused_and_the_others_are_as_they_were():
    model = ENCODERS["wavlm"].make()
    last = attentions(model)[1]
    last.forward = last.forward
    with pytest.raises(hp.UnsupportedModel, match="has had its forward replaced"), own_attention(model):
        pass
    assert not isinstance(attentions(model)[0], OwnWavLM)


@pytest.mark.parametrize("by_config", [False, True])
def test_attention_weights_are_the_mean_over_the_heads_that_are_left(by_config):
    model, batch = ENCODERS["wavlm"].make(), ENCODERS["wavlm"].batch("left")
    model.config.output_attentions = by_config
    asked = {} if by_config else {"output_attentions": True}
    expected = model(**batch, **asked).attentions
    with own_attention(model):
        for found, stock in zip(model(**batch, **asked).attentions, expected, strict=True):
            assert found.shape == stock.shape
            assert torch.allclose(found, stock, atol=1e-6)
    hp.cut(model, {site.name: [] if index else [0, 3, 1] for index, site in enumerate(hp.attention_sites(model))})
    assert [weights.shape[1] for weights in model(**batch, **asked).attentions] == [3, 0]


@pytest.mark.parametrize("criterion", ["entropy", "locality"])
def test_our_operator_tells_what_each_head_looks_at(criterion):
    model = ENCODERS["wavlm"].make()
    scores = hp.score(model, [ENCODERS["wavlm"].batch("left")], criterion=criterion)
    assert all(torch.isfinite(scores[site.name]).all() for site in hp.attention_sites(model))


def test_losses_without_heads_are_those_of_the_gated_model_and_a_search_that_would_compare_nothing_is_refused():
    model, batch = ENCODERS["wavlm"].make(), ENCODERS["wavlm"].batch("left")
    keep = {site.name: [0, 2] for site in hp.attention_sites(model)}
    with hp.gated(model, keep), torch.no_grad():
        expected = model(**batch).loss
    masks = {name: torch.tensor([[1.0, 0.0, 1.0, 0.0]]) for name in keep}
    assert torch.allclose(masked_losses(model, batch, masks).mean(), expected, atol=1e-5)
    with pytest.raises(hp.InvalidInput, match="nothing to compare"):
        masked_fitness(model, [batch])


def test_dropout_falls_on_the_attention_weights_as_in_the_stock_module():
    model, batch = ENCODERS["wavlm"].make(), ENCODERS["wavlm"].batch("left")
    for attention in attentions(model):
        attention.dropout = 0.5
    batch.pop("labels")
    model.train()
    means = []
    for block in (nullcontext(model), own_attention(model)):
        with block, torch.no_grad():
            torch.manual_seed(0)
            means.append(torch.stack([model(**batch).logits for _ in range(400)]).mean(dim=0))
    assert (means[0] - means[1]).abs().max() < 0.15


def test_checkpointing_gives_the_same_gradients():
    model, batch = ENCODERS["wavlm"].make(), ENCODERS["wavlm"].batch("left")
    hp.cut(model, {site.name: [1, 3] for site in hp.attention_sites(model)})
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])
