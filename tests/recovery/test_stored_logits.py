"""Logits on disk teach as the model itself does."""

import copy
from contextlib import nullcontext

import pytest
import torch
from pruned_pairs import pruned_classifier, pruned_llama, text_batches

import headprune as hp
from headprune.errors import InvalidInput


def test_all_stored_classes_give_the_loss_of_the_model(tmp_path):
    dense, pruned = pruned_llama()
    batches = text_batches(2)
    folder = hp.recovery.store_logits(dense, batches, tmp_path, top=61, temperature=2.0)
    distil = hp.Distillation(logits=1.0, temperature=2.0)
    with torch.no_grad():
        for batch in batches:
            expected = hp.recovery.loss(pruned, batch, dense, distil)
            torch.testing.assert_close(hp.recovery.loss(pruned, batch, folder, distil), expected, rtol=1e-4, atol=1e-6)


def test_a_student_recovers_from_a_few_stored_classes(tmp_path):
    dense, pruned = pruned_llama()
    batches = text_batches()
    folder = hp.recovery.store_logits(dense, batches, tmp_path, top=16)
    with torch.no_grad():
        before = hp.recovery.loss(pruned, batches[0], dense, hp.Distillation(logits=1.0))
    hp.recover(pruned, batches, teacher=folder, distil=hp.Distillation(logits=1.0), steps=12, lr=3e-3)
    with torch.no_grad():
        assert hp.recovery.loss(pruned, batches[0], dense, hp.Distillation(logits=1.0)) < 0.8 * before


def test_a_killed_pass_goes_on(tmp_path):
    dense, _ = pruned_llama()
    batches = text_batches(4)

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hp.recovery.store_logits(dense, batches, tmp_path, progress=stop)
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    hp.recovery.store_logits(dense, batches, tmp_path)
    assert len(calls) == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_pass_that_was_killed_before_it_had_said_what_it_stores_goes_on(tmp_path):
    """Between the first batch's file and teacher.json there is a moment."""
    dense, pruned = pruned_llama()
    batches = text_batches(2)
    hp.recovery.store_logits(dense, batches, tmp_path)
    expected = hp.recovery.loss(pruned, batches[0], tmp_path, hp.Distillation(logits=1.0))
    (tmp_path / "teacher.json").unlink()
    hp.recovery.store_logits(dense, batches, tmp_path)
    assert torch.equal(hp.recovery.loss(pruned, batches[0], tmp_path, hp.Distillation(logits=1.0)), expected)


def test_logits_of_a_plain_module_are_stored_through_its_loss(tmp_path):
    dense, pruned, batches, loss_fn = pruned_classifier()
    folder = hp.recovery.store_logits(dense, batches, tmp_path, top=5, temperature=1.0, loss_fn=loss_fn)
    distil = hp.Distillation(logits=1.0, temperature=1.0)
    expected = hp.recovery.loss(pruned, batches[1], dense, distil, loss_fn=loss_fn)
    torch.testing.assert_close(
        hp.recovery.loss(pruned, batches[1], folder, distil, loss_fn=loss_fn), expected, rtol=1e-4, atol=1e-6
    )


def test_what_does_not_fit_is_refused(tmp_path):
    dense, pruned = pruned_llama()
    batches = text_batches(2)
    folder = hp.recovery.store_logits(dense, batches[:1], tmp_path / "stored", top=8)
    logits = hp.Distillation(logits=1.0)
    with pytest.raises(InvalidInput, match="no logits of this batch"):
        hp.recovery.loss(pruned, batches[1], folder, logits)
    with pytest.raises(InvalidInput, match=r"of temperature 2\.0, the distillation's is 1\.0"):
        hp.recovery.loss(pruned, batches[0], folder, hp.Distillation(logits=1.0, temperature=1.0))
    with pytest.raises(InvalidInput, match="cannot teach hidden"):
        hp.recovery.loss(pruned, batches[0], folder, hp.Distillation(logits=1.0, hidden=1.0))
    with pytest.raises(InvalidInput, match="holds no stored logits"):
        hp.recovery.loss(pruned, batches[0], tmp_path, logits)
    with pytest.raises(InvalidInput, match=r"with other settings \(top: 8 there, 16 asked\)"):
        hp.recovery.store_logits(dense, batches, folder, top=16)
    with pytest.raises(InvalidInput, match=r"with other settings \(weights"):
        hp.recovery.store_logits(pruned_llama(seed=1)[0], batches, folder, top=8)
    with pytest.raises(InvalidInput, match="does not call the model itself"):
        hp.recovery.store_logits(dense, batches, tmp_path / "none", loss_fn=lambda model, batch: torch.tensor(0.0))
    assert not (tmp_path / "none").exists()


def test_a_teacher_that_was_trained_on_is_another_one(tmp_path):
    """However little the norms of its weights tell of it; the same one, made again to rounding, goes on."""
    dense, _ = pruned_llama()
    batches = text_batches(1)
    folder = hp.recovery.store_logits(dense, batches, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for share, other in ((1e-7, False), (1e-2, True)):
        trained = copy.deepcopy(dense)
        with torch.no_grad():
            for weight in trained.parameters():
                weight += share * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
        with pytest.raises(InvalidInput, match=r"with other settings \(weights") if other else nullcontext():
            hp.recovery.store_logits(trained, batches, folder)


def test_the_teacher_s_modes_are_as_they_were(tmp_path):
    dense, _ = pruned_llama()
    dense.eval()
    dense.lm_head.train()
    hp.recovery.store_logits(dense, text_batches(1), tmp_path)
    assert dense.lm_head.training
    assert not dense.training
