"""A tiny encoder, data and a training for tests of schedules."""

import torch
from tiny_models import bert, tokens
from transformers import TrainerCallback

from headprune.models import attention_sites


def tiny():
    """Two layers of four heads."""
    return bert()


def batches(count: int = 4):
    return [{"input_ids": tokens(4, 8, seed)} for seed in range(count)]


def loss(model, batch):
    """Per sample: some of the last states should be small."""
    return model(**batch).last_hidden_state[:, :, :5].square().mean(dim=(1, 2))


def short_training(model, round) -> None:
    """A few steps on the round's data, whose order hangs on its seed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    order = torch.randperm(len(round.train), generator=torch.Generator().manual_seed(round.seed))
    for done, index in enumerate(order.tolist()):
        optimizer.zero_grad()
        round.loss_fn(model, round.train[index]).mean().backward()
        optimizer.step()
        if round.progress:
            round.progress(done + 1, len(order))


PLANTED = {"encoder.layer.0.attention": [1, 3], "encoder.layer.1.attention": [0, 2]}


def planted(kind: str):
    """(model, batches, loss_fn): half of the heads of `model` are of no use: their output is 0, or noise."""
    clean = tiny()
    sites = {site.name: site for site in attention_sites(clean)}
    for name, heads in PLANTED.items():
        sites[name].output.module.weight.data[:, sites[name].columns(heads)] = 0.0
    data = [{"input_ids": tokens(8, 8, seed)} for seed in range(4)]
    with torch.no_grad():
        data = [{**batch, "target": clean(**batch).last_hidden_state} for batch in data]
    if kind == "noise":
        for name, heads in PLANTED.items():
            site, columns = sites[name], sites[name].columns(heads)
            site.output.module.weight.data[:, columns] = (
                torch.randn(32, len(columns), generator=torch.Generator().manual_seed(1)) * 0.2
            )
            site.projection("value").module.register_forward_hook(Noise(site.projection("value").features[heads].flatten()))
    return clean, data, squared_error


class Noise:
    """Replaces some features of a layer's output by noise, as long as the layer is whole."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features

    def __call__(self, module, args, output):
        if output.shape[-1] == 32:
            output = output.clone()
            output[..., self.features] = torch.randn(*output.shape[:-1], len(self.features))
        return output


def squared_error(model, batch):
    return (model(input_ids=batch["input_ids"]).last_hidden_state - batch["target"]).square().mean(dim=(1, 2))


class Rates(TrainerCallback):
    """Notes the learning rate of every step in a list."""

    def __init__(self, found: list) -> None:
        self.found = found

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.found.append(optimizer.param_groups[0]["lr"])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step
