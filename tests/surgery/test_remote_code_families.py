"""Every family loads from its folder with nothing but transformers and gives the right outputs, without the first attention too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_decoders
import torch
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import padded
from tiny_vision_language import VISION_LANGUAGE

import headprune as hp

OTHERS = {**ENCODERS, **SEQ2SEQ, **VISION, **VISION_LANGUAGE}
# Heads of the first attention, and of the others.
PLANS = {"some": ([2, 3], [0, 1, 3]), "emptied": ([], [1, 2])}
SCRIPT = """
import json, sys
sys.modules["headprune"] = None  # any import of it now fails
import torch, transformers
import page_backbone
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
found = {}
for folder in sys.argv[1:]:
    batch = torch.load(folder + "/batch.pt")
    with open(folder + "/config.json") as file:
        config = json.load(file)
    kind = next(auto for auto, name in config["auto_map"].items() if name.endswith(".HeadPruned" + config["architectures"][0]))
    options = {"trust_remote_code": True, "local_files_only": True, "attn_implementation": batch["attention"]}
    model = getattr(transformers, kind).from_pretrained(folder, **options).eval()
    with torch.no_grad():
        output = model(**batch["inputs"])
    logits = next(output[name] for name in ("logits", "logits_per_image") if name in output)
    found[folder] = float(((logits - batch["expected"]) * batch["counted"]).abs().max())
print(json.dumps(found))
"""


def pruned_folder(name: str, plan: str, folder: Path) -> None:
    """A pruned model, an input and what it gives."""
    if name in tiny_decoders.FAMILIES:
        model, inputs = tiny_decoders.decoder(name), padded(side="right")
    else:
        model, inputs = OTHERS[name].make("eager"), OTHERS[name].batch("right")
    attention = model.config._attn_implementation
    first, others = PLANS[plan]
    hp.cut(model, {site.name: others if index else first for index, site in enumerate(hp.attention_sites(model))}, verify=False)
    hp.save(model, folder)
    model.set_attn_implementation("eager") if model._can_set_attn_implementation() else None
    with torch.no_grad():
        output = model(**inputs)
    logits = next(output[key] for key in ("logits", "logits_per_image") if key in output)
    counted = inputs.get("attention_mask", torch.ones(()))
    fits = counted.dim() == 2 and logits.dim() == 3 and logits.shape[:2] == counted.shape
    torch.save(
        {"inputs": inputs, "expected": logits, "counted": counted[..., None] if fits else torch.ones(()), "attention": attention},
        folder / "batch.pt",
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, float]:
    root = tmp_path_factory.mktemp("families")
    cases = [(name, plan) for name in (*tiny_decoders.FAMILIES, *OTHERS) for plan in PLANS]
    for name, plan in cases:
        pruned_folder(name, plan, root / f"{name}-{plan}")
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", SCRIPT, *(str(root / f"{name}-{plan}") for name, plan in cases)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder).name: value for folder, value in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [*tiny_decoders.FAMILIES, *OTHERS])
def test_a_pruned_family_loads_where_headprune_is_not(found, name, plan):
    assert found[f"{name}-{plan}"] <= 2e-5  # eager there, sdpa here; linear attention behind it makes the difference larger
