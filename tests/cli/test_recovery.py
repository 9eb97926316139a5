"""`headprune recover`: a folder becomes a better one, and what cannot be is one clear line."""

import pytest
from command_line import only_error
from pruned_pairs import pruned_bert
from tiny_models import hidden, tokens

from headprune.evaluation.tasks import Task, register_task
from headprune.surgery import load, save


@register_task
class States(Task):
    """Random tokens, for a random encoder."""

    name = "states-for-recovery-tests"
    headline = "norm"
    higher_is_better = False

    def __init__(self, tokenizer):
        self.tokenizer = None
        self.calibration = [{"input_ids": tokens(4, 8, seed)} for seed in range(4)]

    def loss(self, model, batch):
        return model(**batch).last_hidden_state[:, 0].square().mean(dim=1)

    def forward(self, model, batch):
        return model(**batch)

    def evaluate(self, model, progress=None):
        return {"norm": float(self.outputs(model).norm())}

    def outputs(self, model):
        return hidden(model, input_ids=tokens(4, 8, 50))

    def latency_inputs(self):
        return {"input_ids": tokens(2, 8)}


@pytest.fixture
def folders(monkeypatch, tmp_path):
    monkeypatch.setattr("headprune.evaluation.tasks.task.build_task", lambda name, tokenizer, **_: States(tokenizer))
    monkeypatch.setattr("headprune.evaluation.tasks.build_task", lambda name, tokenizer, **_: States(tokenizer))
    dense, pruned = pruned_bert()
    save(dense, tmp_path / "dense")
    save(pruned, tmp_path / "pruned")
    return dense, pruned


def test_recover_learns_from_the_dense_model(call, folders, tmp_path):
    dense, pruned = folders
    code, out, err = call("recover", "./pruned", "-o", "better", "--teacher", "./dense", "--steps", "6", "--lr", "1e-3")
    assert code == 0, err
    assert "6 steps in" in out
    found, batch = load(tmp_path / "better"), {"input_ids": tokens(4, 8, 0)}
    error = [float((hidden(model, **batch) - hidden(dense, **batch)).square().mean()) for model in (pruned, found)]
    assert error[1] < error[0]
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned", "better"}


def test_two_budgets_and_unknown_methods_are_refused(call, folders):
    code, _, err = call("recover", "./pruned", "-o", "better", "--steps", "6", "--minutes", "1")
    assert code == 2
    assert "give one of them" in only_error(err)
    code, _, err = call("recover", "./pruned", "-o", "better", "--steps", "6", "--method", "lore")
    assert code == 2
    assert "Did you mean 'lora'" in only_error(err)
