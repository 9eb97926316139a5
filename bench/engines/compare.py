"""Exports pruned models to gguf and compares llama.cpp with ours: logits of every position, and 32 greedy tokens.

    python bench/engines/compare.py --engine .venv-engines/bin/python      # `make engines` builds the engine first

In an f32 file, with an fp32 cache and no flash attention, both sides sum the same fp32 products in another order and llama.cpp gets
each rotation angle from the last by a product: the bound, 1e-5 of the largest logit, is some hundred roundings (6e-8), and no
greedy token may differ. Other dtypes round the weights on llama.cpp's side alone; their bound is twice the rounding of one weight,
and their tokens are only counted. `dense_difference`, the distance from the model before pruning, shows that a wrong head would not
pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
from engines.models import CASES, Case
from engines.trained import TEXT
from machine import machine

import headprune as hp
from headprune.surgery.export import export

TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}  # of the largest logit
PROMPT, NEW_TOKENS = 48, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=".venv-engines/bin/python", help="the Python that has llama_cpp")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("llama_cpp.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [prepared(case, Path(folder) / str(number)) for number, case in enumerate(CASES)]
        engine = run(arguments.engine, [one["request"] for one in found], Path(folder))
        rows = [row(case, one) for case, one in zip(CASES, found)]
    report = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine("cpu"), "engine": engine, "tolerance": TOLERANCE,
        "compared": f"logits of {PROMPT} positions, {NEW_TOKENS} greedy tokens; errors are of the largest logit",
        "rows": rows,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(line(one) for one in rows), f"written to {arguments.output}", sep="\n")
    sys.exit(any(not one["equal"] for one in rows))


def prepared(case: Case, place: Path) -> dict:
    """Writes the file; what the engine is asked, and our answer."""
    dense, model, *tokenizer = case.build()
    path = place.with_suffix(".gguf")
    exported = export(model, "gguf", path, dtype=case.dtype, tokenizer=tokenizer[0] if tokenizer else None)
    text = tokenizer[0](TEXT)["input_ids"] if tokenizer else None
    tokens = torch.tensor(text[:PROMPT]) if tokenizer else random_tokens(model.config.vocab_size)
    request = {
        "model": str(path), "tokens": tokens.tolist(), "text": TEXT if tokenizer else None, "new_tokens": NEW_TOKENS,
        "output": str(place.with_suffix(".npz")),
    }  # fmt: skip
    return {
        "request": request, "notes": exported.notes, "logits": logits(model, tokens), "dense": logits(dense, tokens),
        "greedy": greedy(model, tokens), "text_tokens": text, "heads": [str(site.head_map) for site in hp.attention_sites(model)],
    }  # fmt: skip


def random_tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens: torch.Tensor) -> np.ndarray:
    return model(input_ids=tokens[None]).logits[0].numpy()


@torch.no_grad()
def greedy(model, tokens: torch.Tensor) -> list[int]:
    inputs = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens[None])}
    found = model.generate(
        **inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    return found[0, len(tokens) :].tolist()


def run(engine: str, requests: list[dict], folder: Path) -> dict:
    """Has the engine's Python answer all requests; what it says of itself."""
    (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    command = [engine, str(Path(__file__).with_name("run_gguf.py")), str(folder / "requests.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr[-4000:]}")
    return json.loads(finished.stdout.splitlines()[0])


def row(case: Case, ours: dict) -> dict:
    theirs = np.load(ours["request"]["output"])
    scale = float(np.abs(ours["logits"]).max())
    error, dense = (float(np.abs(ours[key] - theirs["logits"]).max()) / scale for key in ("logits", "dense"))
    same = sum(a == b for a, b in zip(ours["greedy"], theirs["greedy"].tolist()))
    architecture = ours["notes"][0].removeprefix("architecture ").partition(",")[0]
    text = None if ours["text_tokens"] is None else ours["text_tokens"] == theirs["text_tokens"].tolist()
    equal = error <= TOLERANCE[case.dtype] and architecture == case.architecture and text is not False
    return {
        "model": case.name, "dtype": case.dtype, "heads": ours["heads"], "architecture": architecture,
        "equal": equal and (same == NEW_TOKENS or case.dtype != "f32"), "logit_error": error, "largest_logit": scale,
        "dense_difference": dense, "same_greedy_tokens": same, "same_text_tokens": text, "export": list(ours["notes"]),
    }  # fmt: skip


def line(one: dict) -> str:
    what = f"{'ok  ' if one['equal'] else 'FAIL'} {one['model']:40} {one['dtype']:5} {one['architecture']:8}"
    errors = f"logits {one['logit_error']:.1e}, dense {one['dense_difference']:.1e}"
    return f"{what} {errors}, greedy {one['same_greedy_tokens']} of {NEW_TOKENS}"


if __name__ == "__main__":
    main()
