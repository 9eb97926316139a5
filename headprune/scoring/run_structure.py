"""What one pass of a model looks like: which calls it makes, where its batch lies, and where each site is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from headprune.models.site import AttentionSite
from headprune.scoring.folding import Dims, argument_dims, batch_dims, fold, folded
from headprune.scoring.replay import Call, Plan, plan_until, tracing


@dataclass(frozen=True)
class RunStructure:
    """arguments, output: batch dimensions of the model's call. dims: those of each call's result, None where it cannot be
    stored. gate_dim: site -> batch dimension of its output projection's input, in the order in which sites are reached.
    plans: site -> how to replay up to its gates."""

    form: TreeSpec
    arguments: Dims
    output: Dims
    calls: tuple[Call, ...]
    dims: tuple[Dims | None, ...]
    gate_dim: dict[str, int]
    plans: dict[str, Plan]


def run_structure(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    call: tuple[tuple, dict],
    traced: Sequence[Call],
    batch_dim: int,
    same: Callable[[Any], bool],
) -> RunStructure | None:
    """Runs the call (args, kwargs), `traced` before, again with the batch doubled and compares, if it lies in `batch_dim`.

    None where the doubled batch does not do twice what the batch does; same(output) tells whether an output is the dense one.
    """
    arguments = argument_dims(*call, batch_dim)
    if arguments is None or not any(dim is not None for dim in arguments):
        return None
    args, kwargs = folded(call, arguments, 2)
    try:
        with tracing(model) as doubled:
            output = model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # shapes that do not fit, in the model's words
        return None
    if [one.module for one in traced] != [two.module for two in doubled]:
        return None
    dims = tuple(batch_dims(one.returned, two.returned) for one, two in zip(traced, doubled))
    gate_dim = gate_dims(sites, traced, doubled)
    if dims[0] is None or gate_dim is None or not all(same(fold(output, dims[0], 2, index)) for index in range(2)):
        return None
    storable = [found is not None and one.storable for found, one in zip(dims, traced)]
    outputs = {site.name: site.output.module for site in sites}
    plans = {name: plan_until(traced, storable, outputs[name]) for name in gate_dim}
    return RunStructure(tree_flatten(call)[1], arguments, dims[0], tuple(traced), dims, gate_dim, plans)


def gate_dims(sites: Sequence[AttentionSite], traced: Sequence[Call], doubled: Sequence[Call]) -> dict[str, int] | None:
    """Site -> batch dimension of what its output projection receives; None where one has none."""
    names = {site.output.module: site.name for site in sites}
    found: dict[str, int] = {}
    for one, two in zip(traced, doubled):
        if one.module in names:
            dims = batch_dims(one.received[:1], two.received[:1])
            if not dims or dims[0] is None or found.get(names[one.module], dims[0]) != dims[0]:
                return None
            found[names[one.module]] = dims[0]
    return found


def gate_rows(site: AttentionSite, gates: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    """A change of the output projection's input: row r of `gates` [rows, query_heads] for the r-th part of its batch."""
    owner = site.head_of_column()

    def change(inputs: Tensor) -> Tensor:
        columns = gates.to(inputs.device)[:, owner.to(inputs.device)].to(inputs.dtype)
        columns = columns.repeat_interleave(inputs.shape[dim] // len(columns), dim=0)
        shape = [1] * inputs.dim()
        shape[dim], shape[-1] = columns.shape
        return inputs * columns.view(shape)

    return change
