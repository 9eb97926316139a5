import pytest
import torch
from tiny_models import llama, tokens

import headprune as hp
from headprune.errors import InvalidInput

BATCHES = [{"input_ids": tokens(6, 12, seed), "labels": tokens(6, 12, seed)} for seed in range(6)]


def scored_and_pruned(model):
    scores = hp.score(model, BATCHES, criterion="fisher")
    chosen = hp.search_plan(model, scores, hp.Budget(heads=0.5), BATCHES, trials=2).plan
    hp.prune(model, chosen, calibration=BATCHES)
    return scores


def test_inside_inference_mode_models_are_scored_and_pruned_as_outside():
    model, other = llama(), llama()
    with torch.inference_mode():
        scores = scored_and_pruned(model)
    expected = scored_and_pruned(other)
    for name, found in scores.items():
        torch.testing.assert_close(found, expected[name])
    for name, found in model.state_dict().items():
        torch.testing.assert_close(found, other.state_dict()[name])
    model(**BATCHES[0]).loss.backward()  # its weights can still be trained


def test_so_are_torchs_own_attentions_which_are_swapped_meanwhile():
    model, x = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), torch.randn(6, 5, 16)
    loss = lambda model, x: model(x).square().sum(dim=(1, 2))  # noqa: E731
    with torch.inference_mode():
        scores = hp.score(model, [x], "fisher", loss_fn=loss)
        hp.prune(model, hp.plan(scores, hp.Budget(heads=0.5)))
        done = hp.recover(model, [x], loss_fn=loss, steps=1)
    assert done.steps == 1
    model(x).sum().backward()


def test_weights_without_values_are_refused():
    with pytest.raises(InvalidInput, match="is on the meta device, without a value; load the weights first"):
        hp.score(torch.nn.TransformerEncoderLayer(16, 4, 32).to("meta"), criterion="magnitude_l2")
    assert list(hp.score(torch.nn.TransformerEncoderLayer(16, 4, 32).to("meta"), criterion="random")) == ["self_attn"]


def test_a_model_that_was_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = llama()
    with pytest.raises(InvalidInput, match="was made under torch"):
        hp.score(model, BATCHES, criterion="fisher")
