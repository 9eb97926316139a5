import sys
import types

import pytest
import torch
from tiny_models import bert, tokens

from headprune.evaluation import energy

INPUTS = {"input_ids": tokens(2, 6)}


def test_without_a_gpu_counter_there_is_no_energy(monkeypatch):
    assert energy.energy_counter(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert energy.energy_counter(torch.device("cuda")) is None
    assert energy.measure_energy({"model": bert()}, INPUTS) == {"model": None}


def test_the_counter_is_the_gpus_own_in_joules(monkeypatch):
    asked = []
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5000 if handle == "handle" else 0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    assert energy.energy_counter(torch.device("cuda"))() == 5.0
    assert asked == ["GPU-1-2"]


def test_energy_is_shared_out_over_the_sequences_of_each_model(monkeypatch):
    models, running = {"dense": bert(), "pruned": bert(seed=1)}, []
    joules = {"now": 0.0}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: running.append(name) or joules.update(now=joules["now"] + len(name)))
    monkeypatch.setattr(energy, "energy_counter", lambda device: lambda: joules["now"])
    found = energy.measure_energy(models, INPUTS, rounds=3, seconds=0.0)
    assert running == ["dense", "pruned"] * 3
    assert found == {"dense": pytest.approx(len("dense") / 2), "pruned": pytest.approx(len("pruned") / 2)}
