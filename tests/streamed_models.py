"""Model folders with several weight files, and batches for them."""

from pathlib import Path

import torch
from tiny_decoders import decoder
from tiny_models import padded


def sharded_folder(family: str, folder: Path, **options) -> Path:
    decoder(family, **options).save_pretrained(folder, max_shard_size="20KB")
    return folder


def labelled(side: str = "right", batch: int = 3) -> dict[str, torch.Tensor]:
    found = padded(batch, side=side)
    return found | {"labels": torch.where(found["attention_mask"] > 0, found["input_ids"], -100)}
