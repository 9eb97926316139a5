"""A model's folder as a place to write to: what a model may take the place of there, and what stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headprune.errors import InvalidInput
from headprune.files import parsed_json, put_back, refuse_unwritable, replace_folder, whole_folder

MANIFEST = "headprune.json"
MARKS = ("config.json", MANIFEST, "*.safetensors", "*.gguf", "*.onnx")  # by which a folder is a model's
COMPANIONS = (
    "added_tokens.json", "bpe.codes", "byte_maps.json", "chat_template.*", "config_sentence_transformers.json", "COPYING*",
    "dict.txt", "emoji.json", "feature_extractor_config.json", "generation_config.json", "LICENCE*", "LICENSE*", "merges.txt",
    "*.model", "modules.json", "normalizer.json", "NOTICE*", "preprocessor_config.json", "processor_config.json",
    "prophetnet.tokenizer", "sentence_bert_config.json", "special_tokens_map.json", "*.spm", "*.tiktoken", "tokenizer*.json",
    "USE_POLICY*", "video_preprocessor_config.json", "*vocab*.json", "vocab.*", "word_*.json",
    "[0-9]_*/config.json", "[0-9]_*/model.safetensors",
)  # fmt: skip
PARTS = (*MARKS, *COMPANIONS, "configuration_*.py", "modeling_*.py", "pytorch_model*.bin", "*.index.json", "*.onnx.data")


def refuse_replacing(target: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """InvalidInput where no model folder could be written as `target`, or it would take the place of something else: a file, the
    folder that we are in, a repository, a folder that holds other things than a model, or, unless `overwrite` is given, a model
    that headprune did not write, of which there may be no other copy."""
    target = Path(target)
    refuse_unwritable(target, file=False)
    put_back(target, PARTS)
    if target.exists() and target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InvalidInput(f"{target} is, or holds, the folder that this runs in, which would be replaced; give a folder in it.")
    if (target / ".git").exists():
        raise InvalidInput(f"{target} is a git repository, which would be replaced; write beside it and copy the files there.")
    found = sorted(path.name for mark in MARKS for path in target.glob(mark))
    if target.exists() and any(target.iterdir()) and not found:
        raise InvalidInput(f"{target} holds no model ({', '.join(MARKS)}) but other things; give a new folder.")
    if found and not overwrite and not is_ours(target):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise InvalidInput(
            f"{target} holds a model that headprune did not write ({', '.join(found[:3])}{more}), which would be replaced; give "
            "another folder, or --overwrite (overwrite=True) where it may go."
        )
    return target


def is_ours(folder: Path) -> bool:
    """Whether headprune wrote the model of `folder`, or a trainer did that had it from headprune."""
    if (folder / MANIFEST).is_file():
        return True
    try:
        return "headprune" in parsed_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def whole_model(target: Path) -> Iterator[Path]:
    """`whole_folder` for a model: of what was in `target`, all stays that is no part of one."""
    with whole_folder(target, PARTS) as draft:
        yield draft


def replace_model(draft: Path, target: Path) -> None:
    """`replace_folder` for a model, as `whole_model`."""
    replace_folder(draft, target, PARTS)
