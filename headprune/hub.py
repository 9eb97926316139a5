"""Models by the name that they have on the Hugging Face Hub, as folders of the Hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from headprune.errors import InvalidInput

NAME = re.compile(r"(?!.*(--|\.\.))(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
DESCRIPTIONS = (
    "bpe.codes", "COPYING*", "LICENCE*", "LICENSE*", "NOTICE*", "prophetnet.tokenizer", "README.md", "USE_POLICY*", "*.jinja",
    "*.json", "*.model", "*.py", "*.spm", "*.tiktoken", "*.txt",
)  # fmt: skip
ELSEWHERE = ("consolidated*", "onnx/*", "openvino/*", "original/*")  # the same weights once more, for others


def local_folder(name: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """`name` as a path; where no such folder is there and it reads owner/name or owner/name@revision, the folder in the Hub's cache
    that holds that model, fetched first unless HF_HUB_OFFLINE is set.

    weights: fetch those too, not only what describes the model.

    Raises InvalidInput where the name is one of the Hub's, and neither its cache nor (where it may be asked) the Hub has the model.
    """
    found = NAME.fullmatch(os.fspath(name))
    if Path(name).exists() or found is None:
        return Path(name)
    try:
        folder = snapshot(found, [*DESCRIPTIONS, *(["*.safetensors"] if weights else [])])
        if weights and not any(folder.glob("*.safetensors")):
            folder = snapshot(found, [*DESCRIPTIONS, "pytorch_model*.bin"])
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            revision = f" --revision {found['revision']}" if found["revision"] else ""
            raise InvalidInput(
                f"{name} is no folder, and {constants.HF_HUB_CACHE} does not hold all of a model of that name. `hf download "
                f"{found['repository']}{revision}` fetches it; with HF_HUB_OFFLINE=0 headprune does."
            ) from None
        raise unreachable(name, error) from error
    except (OSError, HFValidationError) as error:  # no such model, no access, no network; a name that is none
        raise unreachable(name, error) from error
    return folder


def known_folder(name: str | os.PathLike[str] | None) -> Path | None:
    """The folder that `name` means, as `local_folder` finds it without fetching anything; None where it means none."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    found = NAME.fullmatch(os.fspath(name))
    try:
        return None if found is None else snapshot(found, [], offline=True)
    except (OSError, HFValidationError):
        return None


def snapshot(name: re.Match[str], patterns: list[str], offline: bool = False) -> Path:
    return Path(
        snapshot_download(
            name["repository"], revision=name["revision"], allow_patterns=patterns, ignore_patterns=list(ELSEWHERE),
            local_files_only=offline or constants.HF_HUB_OFFLINE,
        )
    )  # fmt: skip


def unreachable(name: str | os.PathLike[str], error: Exception) -> InvalidInput:
    reason = " ".join(str(error).split())[:300]
    return InvalidInput(f"{name} is no folder, and the Hub does not give a model of that name: {reason}")
