"""A tiny encoder, data and a training for tests of schedules."""

import torch
from tiny_models import bert, tokens


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
