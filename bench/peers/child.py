"""What a peer's own Python runs: it prunes by the peer's means, and hands back what came of it. Needs torch and transformers alone.

A script gives two functions: score(model, request) -> anything, and cut(model, scored, request) -> the pruned model (or the
same, changed); and where the peer has its own way to keep a model, save(model, folder) and load(folder, model).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 20.0  # of the similarities in the encoder's loss, as in headprune's task
NEW_TOKENS = 16
SAME = 1e-4  # of the largest output
Batch = dict[str, Tensor]


class Request:
    """What the comparison asks: model (a folder), kind ("encoder" or "decoder"), heads (the fraction to remove), options of the
    peer, and batches: calibration, test and prompt."""

    def __init__(self, path: str) -> None:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        self.model, self.kind, self.heads, self.options = (content[name] for name in ("model", "kind", "heads", "options"))
        self.packages, self.output = content["packages"], Path(content["output"])
        self.notes: list[str] = []  # what a row has to say besides
        batches = torch.load(content["batches"])
        self.calibration, self.test, self.prompt = (batches[name] for name in ("calibration", "test", "prompt"))

    def open(self) -> nn.Module:
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if self.kind == "encoder" else AutoModelForCausalLM
        return kind.from_pretrained(self.model, local_files_only=True, attn_implementation="eager").eval()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's: cross entropy over the batch's documents, or of the next token; a scalar."""
        if self.kind == "decoder":
            return model(**batch, use_cache=False).loss
        queries, documents = embedded(model, batch).chunk(2)
        return nn.functional.cross_entropy(SCALE * queries @ documents.T, torch.arange(len(queries)))


def embedded(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over tokens, of length 1. [texts, hidden]"""
    states, mask = model(**batch)[0], batch["attention_mask"][..., None]
    return nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


@torch.no_grad()
def outputs(model: nn.Module, request: Request) -> Tensor:
    """Embeddings of all test texts; of a decoder each window's summed negative log-likelihood. In order."""
    if request.kind == "encoder":
        return torch.cat([embedded(model, batch) for batch in request.test])
    found = []
    for batch in request.test:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        found.append(losses.double().sum(dim=1))
    return torch.cat(found)


def main(
    score: Callable[[nn.Module, Request], Any],
    cut: Callable[[nn.Module, Any, Request], nn.Module],
    save: Callable[[nn.Module, str], Any] | None = None,
    load: Callable[[str, nn.Module], nn.Module] | None = None,
) -> None:
    """Carries out the request that the first argument names; the last line on stdout is what came of it, as JSON."""
    request = Request(sys.argv[1])
    found: dict[str, Any] = {"python": platform.python_version(), "versions": {name: version(name) for name in request.packages}}
    try:
        torch.manual_seed(0)
        model = request.open()
        found["parameters"], dtype = [count(model)], model.dtype
        scored, found["scoring"] = timed(lambda: score(model, request))
        model, found["cutting"] = timed(lambda: cut(model, scored, request))
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        model.eval()
        if model.dtype != dtype:
            request.notes.append(f"its weights come back in {str(model.dtype).removeprefix('torch.')}")
        found["parameters"].append(count(model))
        found["query_rows"] = query_rows(model)
        torch.save(outputs(model, request), request.output)
        found["kept"] = kept_whole(model, request, save or save_pretrained, load or from_pretrained)
        found["generates"] = generates(model, request) if request.kind == "decoder" else None
    except Exception as error:
        found["failed"] = reason(error)
        traceback.print_exc()
    found["notes"] = request.notes
    print("\n" + json.dumps(found))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    started, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def query_rows(model: nn.Module) -> list[int]:
    """Output features of every query projection, in order: what is left of them, whatever a config says."""
    return [
        module.weight.shape[0]
        for name, module in model.named_modules()
        if name.endswith((".query", ".q_proj")) and hasattr(module, "weight")
    ]


def kept_whole(model: nn.Module, request: Request, save: Callable, load: Callable) -> str:
    """Whether the model comes back from disk with the same outputs; else why not."""
    batch = request.test[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            save(model, folder)
            again = load(folder, model).eval()
            one, other = model(**batch)[0], again(**batch)[0]
            same = float((one - other).abs().max()) <= SAME * float(one.abs().max())
        except Exception as error:
            return f"no: {reason(error)}"
    return "yes" if same else "no: the loaded model gives something else"


def save_pretrained(model: nn.Module, folder: str) -> None:
    model.save_pretrained(folder)


def from_pretrained(folder: str, model: nn.Module) -> nn.Module:
    attention = model.config._attn_implementation
    found, report = type(model).from_pretrained(
        folder, local_files_only=True, output_loading_info=True, attn_implementation=attention
    )
    lost = [*report["missing_keys"], *report["mismatched_keys"]]
    if lost:
        raise ValueError(f"from_pretrained leaves {len(lost)} weights at random, {lost[0]} first")
    return found


@torch.no_grad()
def generates(model: nn.Module, request: Request) -> str:
    """Whether greedy generation with a cache gives what one pass over everything gives, token by token."""
    prompt = request.prompt
    try:
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        made = model.generate(**prompt, **settings)
        logits = model(input_ids=made, use_cache=False).logits
    except Exception as error:
        return f"no: {reason(error)}"
    start = prompt["input_ids"].shape[1]
    chosen = logits[:, start - 1 : -1].clone()
    config = model.generation_config
    if config.eos_token_id is not None:
        chosen[..., config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    return "yes" if torch.equal(chosen.argmax(dim=-1), made[:, start:]) else "no: other tokens than one pass over everything gives"


def reason(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
