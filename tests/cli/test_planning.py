"""Commands that choose heads."""

from types import SimpleNamespace

from tiny_models import bert, llama, tokens

from headprune.cli import planning
from headprune.planning import LatencyTable, PruningPlan
from headprune.planning.latency_table import key_of
from headprune.scoring import score


def test_a_latency_table_of_another_machine_is_refused_unless_it_is_meant(call):
    scores = score(bert(), criterion="magnitude_l1")
    scores.save("scores.json")
    shape = scores.shapes["encoder.layer.0.attention"]
    LatencyTable("a phone", "float32", 1, 8, {key_of(shape): (0, 1, 2, 3, 4)}, 0).save("latency.json")
    arguments = ("plan", "scores.json", "--latency", "0.5", "--table", "latency.json")
    code, _, err = call(*arguments)
    assert code == 2
    assert "measured on a phone" in err
    code, out, err = call(*arguments, "--other-machine")
    assert code == 0, err
    assert "4 of 8 query heads go" in out


def test_a_plan_for_an_engine_keeps_to_what_it_can_run(call):
    score(llama(), criterion="magnitude_l1").save("scores.json")
    code, _, err = call("plan", "scores.json", "--heads", "0.5", "--target", "vllm", "--min-heads", "0")
    assert code == 2
    assert "target vllm needs a head in every layer" in err
    code, _, err = call("plan", "scores.json", "--heads", "0.5", "--target", "stock")
    assert code == 0, err
    chosen = PruningPlan.load("plan.json")
    assert [str(chosen.head_map(name)) for name in chosen] == ["4q/4kv", "4q/4kv"]


def test_plans_are_tried_on_the_model_that_was_scored(call, monkeypatch):
    scores = score(bert(), criterion="magnitude_l1")
    scores.save("scores.json")
    code, _, err = call("plan", "scores.json", "--heads", "0.5", "--trials", "3")
    assert code == 2
    assert "name it with --model" in err
    batches = [{"input_ids": tokens(6, 16, seed)} for seed in range(3)]
    data = SimpleNamespace(calibration=batches, readout=lambda model, batch: model(**batch))
    monkeypatch.setattr(planning, "opened", lambda model, task, device: (bert(), data))
    code, out, err = call("plan", "scores.json", "--heads", "0.5", "--trials", "3", "--model", "bert")
    assert code == 0, err
    assert "4 of 8 query heads go" in out
    assert PruningPlan.load("plan.json").removed_heads == 4
