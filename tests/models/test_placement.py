import pytest
import torch

from headprune.errors import InvalidInput
from headprune.models.placement import chosen_device, trainer_options


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(InvalidInput, match="device is 'cuda'; this machine has cpu"):
        chosen_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("auto") == chosen_device("cuda") == torch.device("cuda")
    assert chosen_device("cuda:1") == torch.device("cuda:1")
    assert chosen_device("cpu") == torch.device("cpu")
    for wrong in ("cuda:2", "gpu", "mps"):
        with pytest.raises(InvalidInput, match=r"this machine has cpu, cuda:0, cuda:1\. Give one of them, or auto"):
            chosen_device(wrong)


def test_training_is_told_where_to_stay_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert trainer_options(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert trainer_options(torch.device("cpu")) == {"use_cpu": True}
    assert trainer_options(torch.device("cuda")) == trainer_options(torch.device("cuda:1")) == {}
