"""`headprune recover`: a folder becomes a better one, and what cannot be is one clear line."""

import json
import re

import pytest
import torch
from command_line import only_error
from pruned_pairs import pruned_bert
from small_states import SmallStates
from tiny_models import hidden, tokens

from headprune.recovery import quantise
from headprune.surgery import load, save


@pytest.fixture
def folders(monkeypatch, tmp_path):
    monkeypatch.setattr("headprune.evaluation.tasks.task.build_task", lambda name, tokenizer, **_: SmallStates(tokenizer))
    monkeypatch.setattr("headprune.evaluation.tasks.build_task", lambda name, tokenizer, **_: SmallStates(tokenizer))
    dense, pruned = pruned_bert()
    save(dense, tmp_path / "dense")
    save(pruned, tmp_path / "pruned")
    return dense, pruned


def test_recover_learns_from_the_dense_model(call, folders, tmp_path):
    dense, pruned = folders
    code, out, err = call("recover", "./pruned", "-o", "better", "--teacher", "./dense", "--steps", "6", "--lr", "1e-3")
    assert code == 0, err
    assert re.search(r"6 steps in \d+ s, training loss \S+ → \S+ \(first and last tenth\)", out)
    task = SmallStates(None)
    qualities = [task.evaluate(model)[task.headline] for model in (pruned, load(tmp_path / "better"))]
    assert (
        "{} ({} is better): {:.4f} → {:.4f}".format(task.headline, "higher" if task.higher_is_better else "lower", *qualities)
        in out
    )
    found, batch = load(tmp_path / "better"), {"input_ids": tokens(4, 8, 0)}
    error = [float((hidden(model, **batch) - hidden(dense, **batch)).square().mean()) for model in (pruned, found)]
    assert error[1] < error[0]
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned", "better"}


def test_the_device_that_was_asked_for_is_where_it_trains(call, folders, monkeypatch):
    import headprune.recovery as recovery

    own, given = recovery.recover, []
    monkeypatch.setattr(
        recovery, "recover", lambda *args, **options: given.append(options.pop("use_cpu", None)) or own(*args, **options)
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for device, cpu in (("cpu", True), ("auto", None)):
        code, _, err = call("recover", "./pruned", "-o", f"on-{device}", "--steps", "1", "--device", device)
        assert code == 0, err
        assert given[-1] is cpu
    for command in (("recover", "./pruned", "-o", "better"), ("compare", "./dense", "--steps", "1")):
        code, _, err = call(*command, "--device", "gpu")
        assert code == 2
        assert "Give one of them, or auto" in only_error(err)


@pytest.mark.parametrize("read", ["pruned", "dense"])
def test_neither_the_model_nor_its_teacher_is_written_over(call, folders, tmp_path, read):
    before = (tmp_path / read / "model.safetensors").read_bytes()
    code, _, err = call("recover", "./pruned", "-o", read, "--teacher", "./dense", "--steps", "1")
    assert code == 2
    assert "is the model that is read; give another folder" in only_error(err)
    assert (tmp_path / read / "model.safetensors").read_bytes() == before


def test_a_model_that_headprune_did_not_write_is_replaced_on_request_alone(call, folders, tmp_path, monkeypatch):
    dense, _ = folders
    dense.save_pretrained(tmp_path / "theirs")
    before = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("headprune.sources.open_model", lambda *_: pytest.fail("a model was opened before the folder was refused"))
        code, _, err = call("recover", "./pruned", "-o", "theirs", "--steps", "1")
    assert code == 2
    assert "theirs holds a model that headprune did not write" in only_error(err)
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == before
    code, _, err = call("recover", "./pruned", "-o", "theirs", "--steps", "1", "--overwrite")
    assert code == 0, err
    assert load(tmp_path / "theirs").config.headprune


def test_the_document_tells_loss_and_quality_before_and_after(call, folders):
    code, out, err = call("recover", "./pruned", "-o", "better", "--teacher", "./dense", "--steps", "12", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["first_loss"] == found["losses"][0][1]
    assert found["last_loss"] == found["losses"][-1][1] != found["first_loss"]
    assert set(found["quality_before"]) == set(found["quality"])
    assert found["quality_before"] != found["quality"]


def test_recover_for_rounded_weights_tells_their_quality(call, folders, tmp_path):
    pytest.importorskip("torchao")
    learnt = ("--teacher", "./dense", "--steps", "6", "--lr", "1e-3")
    code, out, err = call("recover", "./pruned", "-o", "better", *learnt, "--quantise", "int4", "--json")
    assert code == 0, err
    told, task = json.loads(out), SmallStates(None)
    assert told["quantise"] == "int4"
    for name, folder in (("quality_before", "pruned"), ("quality", "better")):
        model = load(tmp_path / folder)
        quantise(model, "int4")
        assert told[name][task.headline] == pytest.approx(task.evaluate(model)[task.headline], rel=1e-4)
        assert told[name] != task.evaluate(load(tmp_path / folder))
    code, _, err = call("recover", "./pruned", "-o", "other", *learnt, "--quantise", "int4", "--method", "lora")
    assert code == 2
    assert "method='lora' adds to them; give 'full' or 'projections'" in only_error(err)


def test_two_budgets_and_unknown_methods_are_refused(call, folders):
    code, _, err = call("recover", "./pruned", "-o", "better", "--steps", "6", "--minutes", "1")
    assert code == 2
    assert "give one of them" in only_error(err)
    code, _, err = call("recover", "./pruned", "-o", "better", "--steps", "6", "--method", "lore")
    assert code == 2
    assert "Did you mean 'lora'" in only_error(err)


def test_a_recovery_that_diverges_is_an_error_and_nothing_is_saved(call, folders, tmp_path, monkeypatch):
    own, calls = SmallStates.loss, []

    def loss(self, model, batch):
        calls.append(1)
        return own(self, model, batch) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(SmallStates, "loss", loss)
    code, _, err = call("recover", "./pruned", "-o", "better", "--steps", "6", "--lr", "1e-3")
    assert code == 2
    assert "Lower lr (now 0.001), in another folder" in err.splitlines()[-1]
    assert not (tmp_path / "better").exists()
