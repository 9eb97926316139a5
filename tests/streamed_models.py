"""Model folders with several weight files, and batches for them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import FAMILIES, MIXED, decoder
from tiny_models import VOCABULARY, padded

# Their last layers read the keys and values of earlier ones; here two read each of the two layers that give them.
SHARING = [family for family in ("gemma3n_shared", "gemma4_shared") if family in FAMILIES]
SHARED_LAYERS = {"num_hidden_layers": 7, "num_kv_shared_layers": 4, "layer_types": [*MIXED * 3, MIXED[0]]}


def sharded_folder(family: str, folder: Path, **options) -> Path:
    decoder(family, **options).save_pretrained(folder, max_shard_size="20KB")
    return folder


def quantised_folder(folder: Path, part: str = "proj.weight") -> Path:
    """A Llama whose weights named so are of fp8 and have scales, as its config says."""
    sharded_folder("llama", folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if part in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 2.0)
        save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
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
