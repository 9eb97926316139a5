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


def test_a_model_that_was_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = llama()
    with pytest.raises(InvalidInput, match="was made under torch"):
        hp.score(model, BATCHES, criterion="fisher")
