"""What each of two ranks does in test_two_ranks.py: `python -m torch.distributed.run --nproc_per_node 2 two_ranks.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from child_process import leave
from pruned_pairs import pruned_llama, text_batches
from safetensors.torch import save_file
from tiny_models import llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import headprune as hp
from headprune.errors import HeadpruneError

CRITERIA = ["fisher", "least_squares", "magnitude_l2", "ablation", "entropy"]
BUDGET = hp.Budget(heads=0.5)


def message(call) -> str:
    try:
        call()
    except HeadpruneError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def observed(batches, **options):
    needs = {need for name in CRITERIA for need in hp.criteria()[name].needs}
    return hp.observe(llama(), batches, needs, **options)


def nan_on_rank_1_from(step: int):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return model(**batch).loss * (float("nan") if dist.get_rank() == 1 and len(calls) > step else 1.0)

    return loss_fn


def sharded(batches) -> dict[str, torch.Tensor]:
    """The weights, on rank 0, after three steps of a loop of one's own under FSDP2."""
    dense, model = pruned_llama()
    objective = hp.recovery.Objective(model, teacher=dense)
    with objective.ready(torch.device("cpu"), batches[0]):
        mesh = init_device_mesh("cpu", (2,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        steps_of(model, objective, [[batch] for batch in batches[dist.get_rank() :: 2]])
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def steps_of(model, objective, batches) -> None:
    """A step on each list of batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for together in batches:
        for batch in together:
            (objective(model, batch) / len(together)).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, batches, said = dist.get_rank(), text_batches(5), {}
    found = observed(batches)
    found.save(folder / f"shared{rank}.safetensors")
    observed(batches[:3] if rank == 0 else batches[3:], distributed="own").save(folder / f"own{rank}.safetensors")
    hp.plan(hp.score_observations(found, "fisher"), BUDGET).save(folder / f"plan{rank}.json")
    said["different"] = message(lambda: observed(batches[rank:]))
    said["too few"] = message(lambda: observed(batches[:1]))
    bad = text_batches(4)
    bad[3] = {**bad[3], "labels": torch.full_like(bad[3]["labels"], -100)}
    said["nan"] = message(lambda: hp.score(llama(), bad, "fisher"))
    dense, model = pruned_llama()
    options = {"teacher": dense, "steps": 6, "lr": 1e-3, "output_dir": folder / "recovery"}
    result = hp.recover(model, text_batches(6), text_batches(3), **options)
    said["again"] = hp.recover(pruned_llama()[1], text_batches(6), text_batches(3), **options).to_json()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / f"model{rank}.safetensors")
    said["recovery"] = result.to_json()
    _, model = pruned_llama()
    said["own data"] = message(lambda: hp.recover(model, text_batches(6)[rank:], steps=2))
    said["own steps"] = message(lambda: hp.recover(model, text_batches(6), steps=2 + rank))
    said["own folder"] = message(lambda: hp.recover(model, text_batches(6), steps=2, output_dir=folder / "own" if rank else None))
    broken = hp.recover(model, text_batches(6), loss_fn=nan_on_rank_1_from(3), steps=9, lr=1e-3)
    said["broken"] = broken.stopped_because
    weights = sharded(text_batches(6))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "sharded.safetensors")
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
