"""Recovery on several ranks: by `hp.recover` (DDP), and sharded by torch's FSDP2 in a loop of one's own.

    torchrun --nproc_per_node 2 examples/distributed_recovery.py
    torchrun --nproc_per_node 8 examples/distributed_recovery.py --model FOLDER --text training.txt --steps 500

Every rank is given the same batches and trains on its share of them. `hp.recover(..., fsdp=True)` shards by FSDP2 too; the loop
here is for those who have one of their own.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.distributed as dist
from quick_models import language_model, your_language_model
from rich import print
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import headprune as hp
from headprune.evaluation import Perplexity

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
parser.add_argument("--text", type=Path, help="text for --model: the first half trains, the second measures")
parser.add_argument("--heads", type=float, default=0.75, help="fraction of the query heads to remove")
parser.add_argument("--steps", type=int, default=20, help="of each recovery")
parser.add_argument("--output", type=Path, default=Path("recovered-llama"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
dense, tokenizer, batches, text = your_language_model(args.model, args.text) if args.model else language_model()
test = Perplexity(text, tokenizer, window=batches[0]["input_ids"].shape[1])

# Scoring splits the batches among the ranks as well; all get the scores of all batches, hence the same plan and the same cut.
pruned = copy.deepcopy(dense)
plan = hp.plan(hp.score(dense, batches[:12], criterion="fisher"), hp.Budget(heads=args.heads))
hp.prune(pruned, plan, calibration=batches[:12])

recovered = copy.deepcopy(pruned)
result = hp.recover(recovered, batches, teacher=dense, steps=args.steps, lr=1e-3, ddp_find_unused_parameters=False)

# The same with every weight, gradient and optimizer state spread over the ranks. The loss is made before the model is sharded.
sharded = copy.deepcopy(pruned).to(device)
objective = hp.recovery.Objective(sharded, teacher=dense)
with objective.ready(torch.device(device), batches[0]):
    mesh = init_device_mesh(device, (ranks,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(args.steps):
        batch = batches[(ranks * step + rank) % len(batches)]
        objective(sharded, {name: value.to(device) for name, value in batch.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
here = sum(weight.to_local().numel() for weight in sharded.parameters())
whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # on rank 0

if rank == 0:
    by_shards = copy.deepcopy(pruned)
    by_shards.load_state_dict(whole)
    print(f"{ranks} ranks, {plan.removed_heads} of {plan.total_heads} query heads gone; DDP: {result}")
    print(f"FSDP2: rank 0 held {here:,} of {by_shards.num_parameters():,} parameters")
    for name, model in (("dense", dense), ("pruned", pruned), ("DDP", recovered), ("FSDP2", by_shards)):
        print(f"perplexity {name}: {test.examples(model)['perplexity'].value:.4f}")
    hp.save(by_shards, args.output, tokenizer=tokenizer)
    print(f"saved to {args.output}")
dist.destroy_process_group()
