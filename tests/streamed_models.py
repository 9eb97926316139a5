"""Model folders with several weight files, and batches for them."""

from pathlib import Path

import torch
from tiny_decoders import decoder
from tiny_models import VOCABULARY, padded


def sharded_folder(family: str, folder: Path, **options) -> Path:
    decoder(family, **options).save_pretrained(folder, max_shard_size="20KB")
    return folder


def labelled(side: str = "right", batch: int = 3) -> dict[str, torch.Tensor]:
    found = padded(batch, side=side)
    return found | {"labels": torch.where(found["attention_mask"] > 0, found["input_ids"], -100)}


def batches_of_tokens(batches: int = 6) -> list[dict[str, torch.Tensor]]:
    """Enough tokens for compensation, some of them padded."""
    found = []
    for seed in range(batches):
        ids = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, :seed] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
