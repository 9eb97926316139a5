"""Exports pruned models and compares the engine that loads them with ours: logits of every position, and 32 greedy tokens.

    python bench/engines/compare.py llama.cpp --python .venv-engines/bin/python      # `make engines`, which builds it first
    python bench/engines/compare.py vllm --python .venv-vllm/bin/python              # `make engines-vllm`

With fp32 weights and cache both sides sum the same fp32 products in another order, and llama.cpp gets each rotation angle from the
last by a product: the bound, 1e-5 of the largest logit, is some hundred roundings (6e-8), and no greedy token may differ. Elsewhere
only the engine's side rounds, and tokens are only counted: weights of another dtype, with a bound of twice the rounding of one of
them; or, as llama.cpp usually runs, keys and values in the cache to f16 in each of the 4 layers, with a bound of 8 roundings.
`dense_difference`, the distance from the model before pruning, shows that a wrong head would not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
from engines.models import LLAMA_CPP, VLLM, Case
from engines.trained import TEXT
from machine import machine

import headprune as hp
from headprune.surgery.export import export, targets

TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3, "f32, usual": 4e-3}  # of the largest logit
PROMPT, NEW_TOKENS = 48, 32


@dataclass(frozen=True)
class Engine:
    """script: what its own Python runs. normalised: it gives log-probabilities in place of logits."""

    script: str
    cases: Sequence[Case]
    normalised: bool = False


ENGINES = {"llama.cpp": Engine("run_gguf.py", LLAMA_CPP), "vllm": Engine("run_vllm.py", VLLM, normalised=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--python", required=True, help="the Python that has the engine")
    parser.add_argument("-o", "--output", type=Path, help="default: beside this file")
    arguments = parser.parse_args()
    engine, output = ENGINES[arguments.engine], arguments.output or Path(__file__).with_name(f"{arguments.engine}.json")
    with tempfile.TemporaryDirectory() as folder:
        found = [prepared(case, Path(folder) / str(number), engine) for number, case in enumerate(engine.cases)]
        versions = run(arguments.python, engine.script, [one["request"] for one in found], Path(folder))
        rows = [row(case, one) for case, one in zip(engine.cases, found)]
    kind = "log-probabilities" if engine.normalised else "logits"
    report = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine("cpu"), "engine": versions, "tolerance": TOLERANCE,
        "compared": f"{kind} of {PROMPT} positions, {NEW_TOKENS} greedy tokens; errors are of the largest",
        "rows": rows,
    }  # fmt: skip
    output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(line(one) for one in rows), f"written to {output}", sep="\n")
    sys.exit(any(not one["equal"] for one in rows))


def prepared(case: Case, place: Path, engine: Engine) -> dict:
    """Exports the model; what the engine is asked, and our answer."""
    dense, model, *tokenizer = case.build()
    path = place.with_suffix(targets()[case.target].suffix or "")
    exported = export(model, case.target, path, tokenizer=tokenizer[0] if tokenizer else None, **case.options)
    text = tokenizer[0](TEXT)["input_ids"] if tokenizer else None
    tokens = torch.tensor(text[:PROMPT]) if tokenizer else random_tokens(model.config.vocab_size)
    request = {
        "model": str(path), "tokens": tokens.tolist(), "text": TEXT if tokenizer else None, "new_tokens": NEW_TOKENS,
        "usual": case.usual, "output": str(place.with_suffix(".npz")),
    }  # fmt: skip
    answers = {name: logits(found, tokens, engine.normalised) for name, found in (("logits", model), ("dense", dense))}
    heads = [str(site.head_map) for site in hp.attention_sites(model)]
    return {
        **answers, "request": request, "notes": exported.notes, "greedy": greedy(model, tokens), "text_tokens": text,
        "heads": heads,
    }  # fmt: skip


def random_tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens: torch.Tensor, normalised: bool) -> np.ndarray:
    found = model(input_ids=tokens[None]).logits[0]
    return (found.double().log_softmax(dim=-1) if normalised else found).numpy()


@torch.no_grad()
def greedy(model, tokens: torch.Tensor) -> list[int]:
    inputs = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens[None])}
    found = model.generate(
        **inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    return found[0, len(tokens) :].tolist()


def run(python: str, script: str, requests: list[dict], folder: Path) -> dict:
    """Has the engine's Python answer all requests; what it says of itself."""
    (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    command = [python, str(Path(__file__).with_name(script)), str(folder / "requests.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr[-4000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def row(case: Case, ours: dict) -> dict:
    theirs, exact = np.load(ours["request"]["output"]), case.precision == "f32"
    scale = float(np.abs(ours["logits"]).max())
    error, dense = (float(np.abs(ours[key] - theirs["logits"]).max()) / scale for key in ("logits", "dense"))
    same = sum(a == b for a, b in zip(ours["greedy"], theirs["greedy"].tolist()))
    architecture = str(theirs["architecture"])
    text = None if ours["text_tokens"] is None else ours["text_tokens"] == theirs["text_tokens"].tolist()
    equal = error <= TOLERANCE[case.precision] and architecture == case.architecture and text is not False
    return {
        "model": case.name, "target": case.target, "precision": case.precision, "heads": ours["heads"],
        "architecture": architecture, "equal": equal and (same == NEW_TOKENS or not exact), "logit_error": error,
        "largest_logit": scale, "dense_difference": dense, "same_greedy_tokens": same, "same_text_tokens": text,
        "export": list(ours["notes"]),
    }  # fmt: skip


def line(one: dict) -> str:
    what = f"{'ok  ' if one['equal'] else 'FAIL'} {one['model']:40} {one['precision']:10} {one['architecture']:8}"
    errors = f"logits {one['logit_error']:.1e}, dense {one['dense_difference']:.1e}"
    return f"{what} {errors}, greedy {one['same_greedy_tokens']} of {NEW_TOKENS}"


if __name__ == "__main__":
    main()
