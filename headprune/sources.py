"""Where a model comes from when a recipe or the command line names one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from headprune import demo
from headprune.errors import unknown_name
from headprune.surgery import load

Progress = Callable[[int, int], None]
# Models that need no folder: name -> function that gives one (training it first, where need be).
EMBEDDED: dict[str, Callable[[Progress | None], Path]] = {"minilm": lambda progress: demo.minilm_path()}


def model_folder(name: str, progress: Progress | None = None) -> Path:
    """The folder of an embedded model ("minilm") or of any model that transformers or headprune saved."""
    if name in EMBEDDED:
        return Path(EMBEDDED[name](progress))
    if not Path(name).exists() and "/" not in name:
        raise unknown_name("model (neither a folder nor an embedded one)", name, EMBEDDED)
    return Path(name)


def demo_recipe(name: str) -> dict[str, Any]:
    """The recipe of the demo on an embedded model, ready to be changed."""
    tasks = {"minilm": "docstring-retrieval"}
    if name not in tasks:
        raise unknown_name("demo model", name, tasks)
    return {"model": name, "task": {"name": tasks[name]}, "output": f"runs/{name}"}


def open_model(name: str, progress: Progress | None = None) -> tuple[PreTrainedModel, Any]:
    """(model in eval mode, tokenizer or None) of `name`, see `model_folder`."""
    folder = model_folder(name, progress)
    model = load(folder).eval()
    has_tokenizer = (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
