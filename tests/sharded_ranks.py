"""What each of two ranks does in test_sharding.py: `python -m torch.distributed.run --nproc_per_node 2 sharded_ranks.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from child_process import leave
from pruned_pairs import padded_batches, pruned_bert, pruned_classifier, pruned_llama, text_batches
from safetensors.torch import save_file
from tiny_models import llama
from torch.distributed import fsdp
from transformers import TrainerCallback

import headprune as hp
from headprune.recovery.sharding import sharded

OPTIONS = {"steps": 6, "lr": 1e-2}


class Stop(TrainerCallback):
    """As a run that is killed after four steps."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def without_a_layer():
    """(dense, pruned, of which the first layer has no head)."""
    dense, pruned = llama(), llama()
    hp.cut(pruned, {"model.layers.0.self_attn": []})
    return dense, pruned


def recovered(make, folder: Path | None = None, **options):
    """(the weights on this rank, what recover returned)."""
    dense, model = make()
    if options.pop("taught", False):
        options["teacher"] = dense
    batches = options.pop("batches", None) or text_batches(6)
    result = hp.recover(model, batches, **{**OPTIONS, **options})
    assert not any(hasattr(tensor, "to_local") for tensor in (*model.parameters(), *model.buffers()))
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}, result


def output_norm(model) -> float:
    """Some measure of the model."""
    with torch.no_grad():
        return float(model(**padded_batches()[0]).last_hidden_state.norm())


def cases(folder: Path):
    """name -> what `recovered` is to do without sharding and with it."""
    return {
        "taught": (pruned_llama, {"taught": True, "eval": text_batches(2)}),
        "accumulated": (pruned_llama, {"gradient_accumulation_steps": 3, "steps": 3, "max_grad_norm": 0.1}),
        "adapters": (pruned_llama, {"method": "lora", "taught": True}),
        "encoder": (pruned_bert, {"taught": True, "batches": padded_batches(), "metric": output_norm}),
        "plain torch": (lambda: pruned_classifier()[:2], dict(zip(("batches", "loss_fn"), pruned_classifier()[2:]))),
        "projections": (pruned_llama, {"method": "projections"}),
        "no heads": (without_a_layer, {"gradient_checkpointing": True}),
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, said = dist.get_rank(), {}
    for name, (make, options) in cases(folder).items():
        for way in ("whole", "sharded"):
            weights, result = recovered(make, fsdp=way == "sharded", **options)
            save_file(weights, folder / f"{name}-{way}{rank}.safetensors")
            said[f"{name}-{way}"] = result.to_json()
    options = {"taught": True, "eval": text_batches(2), "fsdp": True, "output_dir": folder / "run", "save_steps": 2}
    try:
        recovered(pruned_llama, callbacks=[Stop()], **options)
    except KeyboardInterrupt:
        said["stopped"] = sorted(path.name for path in (folder / "run").iterdir())
    weights, result = recovered(pruned_llama, **options)
    save_file(weights, folder / f"resumed{rank}.safetensors")
    said["resumed"] = result.to_json()
    dist.barrier()
    said["left"] = sorted(path.name for path in (folder / "run").iterdir())
    said["differing"] = differing_ranks(rank)
    said["half sharded"] = half_sharded()
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def differing_ranks(rank: int) -> list[float]:
    """A weight of this rank before, in, and after the block, where each rank began with another."""
    _, model = pruned_bert()
    weight = model.encoder.layer[0].output.dense.weight
    torch.nn.init.constant_(weight, rank + 1.0)
    before, parts = float(weight.mean()), {id(parameter) for parameter in model.parameters()}
    with sharded(model, torch.device("cpu")):
        inside = float(model.encoder.layer[0].output.dense.weight.to_local().mean())
    assert model.encoder.layer[0].output.dense.weight is weight
    assert parts == {id(parameter) for parameter in model.parameters()}
    return [before, inside, float(weight.mean())]


def half_sharded() -> list[bool]:
    """Whether a failure at the second unit came through, and the model then gives what it gave."""
    _, model = pruned_llama()
    batch, own, calls = text_batches(1)[0], fsdp.fully_shard, []

    def failing(module, **options):
        calls.append(module)
        if len(calls) == 2:
            raise ValueError("not this one")
        return own(module, **options)

    before, failed = model(**batch).logits, False
    fsdp.fully_shard = failing
    try:
        with sharded(model, torch.device("cpu")):
            pass
    except ValueError:
        failed = True
    finally:
        fsdp.fully_shard = own
    return [failed, torch.equal(model(**batch).logits, before)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
