"""Scoring on several ranks (torchrun): each observes its part of the batches, and all end with the same Observations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from headprune.errors import HeadpruneError, InvalidInput, unknown_name
from headprune.scoring.observations import MERGES, Observations, SiteObservations

Distributed = Literal["share", "own", "off"]
MODES = ("share", "own", "off")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise unknown_name("value of distributed", mode, MODES)


def own_part(batches: Any) -> list[Any]:
    """This rank's batches: neighbours, so that the ranks' samples one after the other are in the order of one rank's."""
    every = list(batches)
    ranks, rank = world_size(), dist.get_rank()
    if every and len(every) < ranks:
        raise InvalidInput(f"{len(every)} batches for {ranks} ranks: give each rank at least one.")
    return every[len(every) * rank // ranks : len(every) * (rank + 1) // ranks]


def rank_file(path: str | Path) -> Path:
    """Beside `path`, one for each rank."""
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{dist.get_rank()}{path.suffix}")


@contextmanager
def together() -> Iterator[Any]:
    """A group of all ranks that speaks gloo, for tensors on the CPU."""
    if dist.get_backend() == "gloo":
        yield dist.group.WORLD
        return
    group = dist.new_group(backend="gloo")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def refuse_different_batches(checksums: Sequence[int]) -> None:
    """InvalidInput, on every rank, unless all were given the same batches."""
    found: list[Any] = [None] * world_size()
    with together() as group:
        dist.all_gather_object(found, list(checksums), group=group)
    if any(other != found[0] for other in found):
        raise InvalidInput(
            'the ranks were given different batches; give all of them the same ones, or distributed="own" where each has its share.'
        )


def merged(observed: Observations | None, problem: Exception | None = None) -> Observations:
    """The observations of all ranks, in their order, the same on each: sums are all-reduced, rows of samples gathered.

    problem: what went wrong on this rank, which then has no observations. Raises it, and HeadpruneError on the other ranks, so
    that no rank waits for ever.
    """
    with together() as group:
        problems: list[Any] = [None] * world_size()
        dist.all_gather_object(problems, None if problem is None else f"{type(problem).__name__}: {problem}", group=group)
        if problem is not None or observed is None:
            raise problem or HeadpruneError("this rank observed nothing.")
        for rank, other in enumerate(problems):
            if other is not None:
                raise HeadpruneError(f"rank {rank} could not observe: {other}")
        sites = {name: merged_site(site, group) for name, site in observed.items()}
        seen: list[Any] = [None] * world_size()
        dist.all_gather_object(seen, observed.seen, group=group)
    return Observations(sites, tuple(checksum for part in seen for checksum in part))


def merged_site(site: SiteObservations, group: Any) -> SiteObservations:
    reached = torch.tensor([float(site.reached)])
    dist.all_reduce(reached, group=group)
    values = {name: getattr(site, name) for name in MERGES if getattr(site, name) is not None}
    whole: dict[str, Any] = {name: COMBINE[MERGES[name]](value, group) for name, value in values.items()}
    return replace(site, reached=bool(reached), **whole)


def summed(value: Tensor, group: Any) -> Tensor:
    total = value.detach().cpu().contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def joined(value: Tensor, group: Any) -> Tensor:
    rows: list[Any] = [None] * world_size()
    dist.all_gather_object(rows, value.detach().cpu(), group=group)
    return torch.cat(rows)


def first(value: Tensor, group: Any) -> Tensor:
    """Of the model alone: rank 0's, should the machines differ in the last bit."""
    found = value.detach().cpu().contiguous().clone()
    dist.broadcast(found, 0, group=group)
    return found


COMBINE = {"sum": summed, "samples": joined, "same": first}
