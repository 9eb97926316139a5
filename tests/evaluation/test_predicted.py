"""Likelihoods of tokens without a tensor of all logits."""

import pytest
import torch
from streamed_models import sharded_folder
from tiny_decoders import FAMILIES, decoder
from tiny_models import llama, tokens
from torch import nn

import headprune as hp
from headprune.errors import UnsupportedModel
from headprune.evaluation import Perplexity
from headprune.evaluation import predicted as module
from headprune.evaluation.predicted import negative_log_likelihood, predicted, predicted_in_parts, predictor, runs_in_parts


class Letters:
    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


SEVERAL_STREAMS = [family for family in FAMILIES if family.startswith("gemma3n")]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SEVERAL_STREAMS])
def test_parts_give_what_all_logits_give(family):
    model, rows = decoder(family), tokens(3, 12)
    with torch.inference_mode():
        losses, hits = predicted(model, rows)
        parts = predicted_in_parts(model, rows, 7)
    torch.testing.assert_close(parts[0], losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(parts[1], hits)
    assert runs_in_parts(model, rows[:1])


@pytest.mark.parametrize("family", SEVERAL_STREAMS)
def test_models_whose_layers_hand_on_several_streams_keep_all_logits(family, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    model, rows = decoder(family), tokens(3, 12)
    assert predictor(model, 3, rows[0]).func is predicted
    with pytest.raises(UnsupportedModel, match="hand on states of 4 dimensions"):
        hp.causal_losses(model, {"input_ids": rows, "labels": rows})


def test_a_model_on_disk_runs_in_parts(tmp_path):
    folder, rows = sharded_folder("llama", tmp_path / "model"), tokens(2, 9)
    with torch.inference_mode():
        found, expected = predicted_in_parts(hp.open_streamed(folder), rows, 4), predicted(hp.load(folder), rows)
    torch.testing.assert_close(found, expected)


def test_metrics_hold_few_logits_at_a_time(monkeypatch):
    data = Perplexity("to be or not to be that is the question " * 8, Letters(), window=32, batch=4)
    whole, most = data.evaluate(llama()), []
    own = module.judged
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "judged", lambda logits, targets: most.append(targets.numel()) or own(logits, targets))
    monkeypatch.setattr(module.predicted_in_parts, "__defaults__", (16,))
    assert data.evaluate(llama()) == pytest.approx(whole, rel=1e-5)
    assert max(most[1:]) <= 16  # but for the probe


def test_a_model_that_adds_something_behind_its_layers_keeps_all_logits(monkeypatch):
    class Running(nn.Module):
        """A norm that remembers the tokens before."""

        def forward(self, states):
            return states.cumsum(dim=1)

    monkeypatch.setattr(module, "LARGE", 1)
    model, rows = llama(), tokens(2, 12)
    assert predictor(model, 2, rows[0]).func is predicted_in_parts
    model.model.norm = Running()
    assert predictor(model, 2, rows[0]).func is predicted
    monkeypatch.setattr(module, "LARGE", 1 << 28)
    assert predictor(llama(), 2, rows[0]).func is predicted


def test_the_loss_of_large_logits_is_the_same_in_parts(monkeypatch):
    logits = torch.randn(2, 7, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(1))
    found = []
    for large, at_once in ((1 << 28, 512), (1, 4)):
        monkeypatch.setattr(module, "LARGE", large)
        monkeypatch.setattr(module, "TOKENS", at_once)
        leaf = logits.clone().requires_grad_()
        losses = negative_log_likelihood(leaf, targets)
        (losses * torch.arange(14).view(2, 7)).sum().backward()
        found.append((losses, leaf.grad))
    assert found[0][0].dtype == torch.float32
    expected = -logits.double().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(found[0][0].double(), expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(*found):
        assert torch.equal(one, other)
