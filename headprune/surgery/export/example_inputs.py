"""Batches of several sizes for a graph whose batch and length are free: one that it is traced on, others that it must fit too."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from headprune.errors import HeadpruneError
from headprune.models.tiny_inputs import tiny_inputs

# (rows, tokens). A trace takes a size of 1 for something that never changes, so it sees none.
TRACED = (2, 6)
CHECKED = ((3, 9), (1, 4))


def example_inputs(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    """Arguments of `model.forward`: `rows` texts, pictures or spectrograms; texts have `tokens` tokens, a decoder's one less,
    and the last row's last one is padding: what stands first or is the largest token may be pooled.

    Raises HeadpruneError where the model does not tell what it takes.
    """
    inputs = tiny_inputs(model)
    if inputs is None:
        raise HeadpruneError(f"{type(model).__name__} does not tell what input it takes, so the export cannot be checked.")
    found = {name: resized(name, value, rows, tokens) for name, value in inputs.items()}
    if "input_ids" in found and tells_texts_apart(model):
        second = torch.arange(tokens, device=found["input_ids"].device) >= tokens // 2
        found["token_type_ids"] = second.long().expand(rows, tokens).contiguous()
    return found


def tells_texts_apart(model: nn.Module) -> bool:
    """Whether it takes the first and the second text of a pair by their types, as BERT does; without them both are the first."""
    types = getattr(getattr(model, "config", None), "type_vocab_size", None) or 0
    return types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def resized(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, *value.shape[1:], generator=generator).to(value)
    length = tokens - 1 if name.startswith("decoder_") else tokens
    if name.endswith("mask"):
        mask = value.new_ones(rows, length)
        mask[-1, -1] = 0
        return mask
    each = value.flatten(0, 1)  # of a page, where each word stands
    return each[torch.arange(rows * length, device=value.device) % len(each)].view(rows, length, *value.shape[2:])
