import pytest
import torch
from tiny_decoders import decoder
from tiny_models import llama, tokens

from headprune.evaluation.latency import measure_generation, measure_latency, synchronize
from headprune.evaluation.machine import machine_name


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_what_runs_on_an_accelerator_of_any_kind_is_waited_for(kind, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    synchronize(torch.device(kind))
    synchronize(torch.device("cpu"))
    assert waited == [torch.device(kind)]


def test_a_gpu_beside_the_processor_is_another_machine():
    assert machine_name(torch.device("mps")) != machine_name(torch.device("cpu"))


@pytest.mark.parametrize(("positions", "prompt"), [(64, 58), (16, 9), (64, 8)])
def test_generation_stays_within_the_models_positions(positions, prompt):
    ids = {"input_ids": tokens(2, prompt)}
    assert measure_generation({"model": decoder("gpt2", n_positions=positions)}, ids, repeats=1)["model"] > 0


def test_models_are_timed_in_turn_after_the_warm_up():
    ran = []
    models = {"a": llama(), "b": llama()}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    found = measure_latency(models, {"input_ids": tokens()}, repeats=4, warmup=2)
    assert ran == ["a", "b"] * 6
    assert found["a"].throughput == pytest.approx(3e3 / found["a"].p50_ms)
