"""What one pass of a model looks like: which calls it makes, where its batch lies, and where each site is reached.

It is found on the first sample of a batch: one pass of it, one of it taken twice, with one site closed in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from headprune.kv_sharing import gives_keys
from headprune.models.gating import gate_columns, output_input_hook
from headprune.models.site import AttentionSite
from headprune.scoring.folding import Dims, alike, argument_dims, batch_dims, first_sample, folded
from headprune.scoring.replay import Call, Plan, plan_until, recording, replaying, tracing

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# How a model refuses shapes that it was not made for, or a replay that lacks what earlier layers leave outside of their results.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class RunStructure:
    """form: the tree of the model's arguments. calls: of its modules, in the order of entry. arguments, output: batch dimensions of
    the model's call. dims: those of each call's result, None where it cannot be stored. gate_dim: site -> batch dimension of its
    output projection's input, in the order in which sites are reached. plans: site -> how to replay up to its gates, empty where
    nothing is over before. proof: whether a replay by a plan, with all heads, gives what the pass gave; asked once for each site at
    which a pass is to start again."""

    form: TreeSpec
    arguments: Dims
    output: Dims
    calls: tuple[Call, ...]
    dims: tuple[Dims | None, ...]
    gate_dim: dict[str, int]
    plans: dict[str, Plan]
    proof: Callable[[Plan], bool]
    _proven: dict[str, bool] = field(default_factory=dict)

    @property
    def wanted(self) -> set[int]:
        """The calls whose results some plan takes."""
        return {index for plan in self.plans.values() for taken in plan.values() for index in taken if index is not None}

    def replays(self, name: str) -> bool:
        if name not in self._proven:
            self._proven[name] = bool(self.plans[name]) and self.proof(self.plans[name])
        return self._proven[name]


def run_structure(model: nn.Module, sites: Mapping[str, AttentionSite], call: Arguments, tolerance: float) -> RunStructure | None:
    """The structure of `call` (args, kwargs) of the model, in eval mode and without gradients; None where the batch taken
    twice does not do twice what it does, so that masks cannot be folded into it, or a gate acts in two places (joint attention)."""
    if any(len(site.outputs) > 1 for site in sites.values()):
        return None
    for batch_dim in (0, 1):
        arguments = argument_dims(*call, batch_dim)
        if arguments is None or not any(dim is not None for dim in arguments):
            continue
        try:
            found = structure_along(model, sites, call, arguments, tolerance)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            continue
        if found is not None:
            return found
    return None


def structure_along(
    model: nn.Module, sites: Mapping[str, AttentionSite], call: Arguments, arguments: Dims, tolerance: float
) -> RunStructure | None:
    sample = first_sample(call, arguments)
    with tracing(model) as traced:
        dense = run(model, sample)
    outputs = {site.output.module: site for site in sites.values()}
    reached = list(dict.fromkeys(outputs[one.module].name for one in traced if one.module in outputs))
    if not reached:
        return None
    first = sites[reached[0]]
    with closed(first):
        without = run(model, sample)
    with tracing(model) as doubled, closed_in_second(first, traced):
        both = run(model, folded(sample, arguments, 2))
    if [one.module for one in traced] != [two.module for two in doubled]:
        return None
    dims = tuple(batch_dims(one.returned, two.returned) for one, two in zip(traced, doubled))
    gate_dim = gate_dims(outputs, traced, doubled)
    if dims[0] is None or gate_dim is None:
        return None
    if not all(alike(both, 2, index, single, dims[0], tolerance) for index, single in enumerate((dense, without))):
        return None
    storable = [found is not None and one.storable and not leaves_keys(one.module) for found, one in zip(dims, traced)]
    plans = {name: plan_until(traced, storable, sites[name].output.module) for name in gate_dim}
    stored: dict[int, Any] = {}
    with recording(traced, list(plans.values()), stored):
        run(model, sample)

    def proof(plan: Plan) -> bool:
        try:
            with replaying(plan, stored, dims, 1):
                return alike(run(model, sample), 1, 0, dense, output, tolerance)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            return False

    output = dims[0]
    return RunStructure(tree_flatten(call)[1], arguments, output, tuple(traced), dims, gate_dim, plans, proof)


def leaves_keys(module: nn.Module) -> bool:
    """Whether a call of `module` leaves keys and values for later layers outside of its result."""
    return any(gives_keys(part) for part in module.modules())


def run(model: nn.Module, call: Arguments) -> Any:
    args, kwargs = call
    return model(*args, **kwargs)


def closed(site: AttentionSite) -> AbstractContextManager[None]:
    return output_input_hook(site, gate_columns(site.by_column(torch.zeros(site.head_map.query_heads))))


def closed_in_second(site: AttentionSite, traced: Sequence[Call]) -> AbstractContextManager[None]:
    """Closes the site in the second half of a doubled batch, along the dimension in which its input has doubled."""
    single = next(call.received[0] for call in traced if call.module is site.output.module)
    gates = torch.stack([torch.ones(site.head_map.query_heads), torch.zeros(site.head_map.query_heads)])

    def change(inputs: Tensor) -> Tensor:
        dims = batch_dims((single,), (inputs.shape,))
        if dims is None or dims[0] is None:
            raise ValueError(
                f"{site.output.name} receives {list(inputs.shape)} for a doubled batch, {list(single)} for a single one"
            )
        return gate_rows(site, gates, dims[0])(inputs)

    return output_input_hook(site, change)


def gate_dims(outputs: Mapping[nn.Module, AttentionSite], traced: Sequence[Call], doubled: Sequence[Call]) -> dict[str, int] | None:
    """Site -> batch dimension of what its output projection receives; None where one has none."""
    found: dict[str, int] = {}
    for one, two in zip(traced, doubled):
        if one.module in outputs:
            name, dims = outputs[one.module].name, batch_dims(one.received[:1], two.received[:1])
            if not dims or dims[0] is None or found.get(name, dims[0]) != dims[0]:
                return None
            found[name] = dims[0]
    return found


def gate_rows(site: AttentionSite, gates: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    """A change of the output projection's input: row r of `gates` [rows, query_heads] for the r-th part of its batch."""
    of_columns = site.by_column(gates)

    def change(inputs: Tensor) -> Tensor:
        columns = of_columns.to(inputs)
        columns = columns.repeat_interleave(inputs.shape[dim] // len(columns), dim=0)
        shape = [1] * inputs.dim()
        shape[dim], shape[-1] = columns.shape
        return inputs * columns.view(shape)

    return change


def folded_pass(
    model: nn.Module,
    sites: Mapping[str, AttentionSite],
    structure: RunStructure,
    call: Arguments,
    gates: Mapping[str, Tensor],
    times: int,
    start: str | None = None,
    stored: Mapping[int, Any] | None = None,
) -> Any:
    """The model's output for the batch taken `times` times with these gates (site -> [rows, query_heads], rows a multiple of
    `times`); with `start` a replay up to that site."""
    with ExitStack() as stack:
        for name, rows in gates.items():
            stack.enter_context(output_input_hook(sites[name], gate_rows(sites[name], rows, structure.gate_dim[name])))
        if start is not None:
            stack.enter_context(replaying(structure.plans[start], stored or {}, structure.dims, times))
        return run(model, folded(call, structure.arguments, times))
