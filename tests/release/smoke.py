"""What `make release-check` runs against an installed headprune, in an empty environment and away from the source tree.

    python -I smoke.py cpp|reference

The main way on a tiny random decoder (score, plan, prune, save, load) and `headprune doctor`; the argument is the backend that must
run attention on this CPU.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headprune as hp


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def doctors_choice() -> dict[str, str]:
    """What `headprune doctor` says runs each operator on this CPU in float32."""
    command = [str(Path(sys.executable).with_name("headprune")), "doctor", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["backends"]
    return {row["operator"]: row["runs through"] for row in rows if (row["device"], row["dtype"]) == ("cpu", "float32")}


@torch.no_grad()
def check_backend(model: LlamaForCausalLM, ids: torch.Tensor, expected: str) -> None:
    """Left alone, the model runs through `expected`: to the bit what it gives when that is forced, with a warning if it is slow."""
    model.set_attn_implementation("headprune")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = model(ids).logits
    with hp.ops.backend(expected):
        forced = model(ids).logits
    assert torch.equal(alone, forced)
    slow = [str(warning.message) for warning in caught if "runs through the PyTorch reference" in str(warning.message)]
    assert bool(slow) == (expected == "reference"), slow


def main(expected: str) -> None:
    package = Path(hp.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not what was installed in {sys.prefix}"
    compiled = sorted(path.name for path in package.glob("*.so"))
    assert bool(compiled) == (expected == "cpp"), compiled
    choice = doctors_choice()
    assert set(choice.values()) == {expected}, choice

    model, ids = decoder(), torch.randint(64, (4, 24))
    check_backend(model, ids, expected)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(2)]
    scores = hp.score(model, batches, criterion="fisher")
    plan = hp.plan(scores, hp.Budget(heads=0.5))
    hp.prune(model, plan, calibration=batches)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        hp.save(model, Path(folder, "pruned"))
        loaded = hp.load(Path(folder, "pruned"))
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    heads = sum(site.head_map.query_heads for site in hp.attention_sites(loaded))
    assert heads == 8, heads
    print(f"headprune {hp.__version__}: attention runs through {expected}; 8 of 16 heads removed, saved and loaded ({package})")


if __name__ == "__main__":
    main(sys.argv[1])
