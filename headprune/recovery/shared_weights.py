"""One copy of what a frozen part of the student and its teacher have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

WRAPPED = ".base_layer"  # how peft calls the layer inside an adapter


@contextmanager
@torch.no_grad()
def shared_weights(student: nn.Module, teacher: nn.Module) -> Iterator[int]:
    """Inside the block every parameter of `teacher` that the student has too, with the same values and frozen, uses the student's
    memory: with adapters that is all but what was cut. Gives the bytes saved. Afterwards the teacher has its own again.
    """
    frozen = {
        name.replace(WRAPPED, ""): parameter
        for name, parameter in student.named_parameters()
        if not parameter.requires_grad and type(parameter) is nn.Parameter
    }
    shared = {
        parameter: frozen[name]
        for name, parameter in teacher.named_parameters()
        if name in frozen and same(parameter, frozen[name])
    }
    for parameter, own in shared.items():
        parameter.data = own.data
    try:
        yield sum(parameter.numel() * parameter.element_size() for parameter in shared)
    finally:
        for parameter in shared:
            parameter.data = parameter.data.clone()


def same(one: nn.Parameter, other: nn.Parameter) -> bool:
    alike = type(one) is nn.Parameter and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and one.data_ptr() != other.data_ptr() and torch.equal(one, other)
