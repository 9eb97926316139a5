"""A model of which each rank holds a part of every parameter while it is trained (FSDP2), and which is whole again afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headprune.errors import HeadpruneError, InvalidInput
from headprune.models.checkpointing import outermost

TENSORS = ("_parameters", "_buffers", "_modules")  # what a module keeps apart from its other attributes
OPTIONS = ("fsdp", "fsdp_config")


def wants_sharding(options: Mapping[str, Any]) -> bool:
    """Whether training arguments ask for FSDP. Raises InvalidInput for what cannot be had."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InvalidInput(
            "recover: accelerate was launched with FSDP, which would leave each rank a part of the model; launch with torchrun or "
            "`accelerate launch --multi_gpu`, and give fsdp=True."
        )
    wanted = options.get("fsdp")
    if options.get("fsdp_config"):
        raise InvalidInput("recover: fsdp_config is not taken; fsdp=True shards layer by layer with FSDP2, leave the rest out.")
    if wanted in (None, False, "", []):
        return False
    if wanted not in (True, "full_shard"):
        raise InvalidInput(f"recover: fsdp={wanted!r}; expected True (FSDP2, every parameter sharded).")
    if options.get("deepspeed"):
        raise InvalidInput("recover: fsdp=True and deepspeed=... shard the same things; give one of them.")
    return True


def refuse_one_rank() -> None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise InvalidInput("recover: fsdp=True shards over several ranks, and there is one; launch with torchrun, or leave it out.")


@contextmanager
def sharded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the layers of `model` and the rest of it are FSDP2 units on `device`, with the weights of rank 0; one layer
    at a time is whole there. Afterwards all but the values is as before: the same parameters, whole on each rank, where they were.

    Where the block ends by an error that other ranks may not have met, nothing is gathered and the parameters are empty. Raises
    InvalidInput for one rank alone, and for what FSDP2 cannot shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    refuse_one_rank()
    refuse_scalars(model)
    before = [(module, type(module), attributes(module), dict(module._parameters)) for module in model.modules()]
    place = {parameter: parameter.device for parameter in model.parameters()}
    home = next(iter(place.values()))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    empty = {parameter for parameter in place if parameter.numel() == 0}
    agreed = False
    try:
        for part in (*outermost(model), model):
            part.to(device)
            of_first_rank(part)
            fully_shard(part, mesh=mesh, ignored_params=empty)
        for parameter in place.keys() - empty:
            parameter.data = parameter.data.new_empty(0)
        yield
        agreed = True
    except HeadpruneError:  # ours are raised on every rank
        agreed = True
        raise
    finally:
        put_back(before, place, gather=agreed)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(home)


def reshard(model: nn.Module) -> None:
    """Takes whole parameters apart again, which FSDP2 leaves behind a forward pass without gradients."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            again: Any = module.reshard
            again()


def refuse_scalars(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise InvalidInput(f"recover: FSDP2 cannot shard {name}, a single number; make it a tensor of one, or leave fsdp out.")


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module is made of besides its tensors and parts; its hooks are copied, for they will be added to."""
    return {
        name: value.copy() if name.endswith("hooks") or "_hooks_" in name else value
        for name, value in module.__dict__.items()
        if name not in TENSORS
    }


@torch.no_grad()
def of_first_rank(part: nn.Module) -> None:
    """Gives every rank the tensors of rank 0, where they are not sharded yet."""
    for tensor in (*part.parameters(), *part.buffers()):
        if not hasattr(tensor, "to_local") and tensor.numel():
            dist.broadcast(tensor.detach(), 0)


@torch.no_grad()
def put_back(before: list[Any], place: Mapping[nn.Parameter, torch.device], gather: bool) -> None:
    """Undoes fully_shard, for which torch has no call: it changes the classes of modules, adds hooks, swaps parameters and notes
    each module in a table."""
    from torch.distributed._composable_state import _module_state_mapping

    reshard(before[0][0])
    done = set()
    for module, kind, own, parameters in before:
        for name, parameter in parameters.items():
            if parameter is None or parameter in done:
                continue
            done.add(parameter)
            now: Tensor = module._parameters[name] if gather else parameter
            if hasattr(now, "full_tensor"):
                parameter.data = now.full_tensor().to(place[parameter], copy=True)  # or it may be a part of a longer storage
            else:
                parameter.data = now.data.to(place[parameter])
        kept = {name: module.__dict__[name] for name in TENSORS}
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(own | kept)
        module._parameters.update(parameters)
        _module_state_mapping.pop(module, None)
