"""Where a model comes from when a recipe or the command line names one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from headprune.embedded import EMBEDDED, Progress
from headprune.errors import CorruptCheckpoint, InvalidInput, unknown_name
from headprune.hub import local_folder
from headprune.surgery import load, open_streamed
from headprune.surgery.checkpoint import class_of
from headprune.surgery.config_file import load_config

SOUND = ("input_features", "input_values")  # what models of sound read
TRIALS = 10  # plans that a demo tries


def model_folder(name: str, progress: Progress | None = None, *, weights: bool = True) -> Path:
    """The folder of an embedded model ("minilm", "stdlib-lm") or of any model that transformers or headprune saved, here or on the
    Hub (`local_folder`). weights: whether they are needed too."""
    if name in EMBEDDED:
        return EMBEDDED[name].folder(progress)
    if not Path(name).exists() and "/" not in name:
        raise unknown_name("model (no folder, no owner/name on the Hub, none that comes with headprune)", name, EMBEDDED)
    return local_folder(name, weights=weights)


def opening(name: str) -> str:
    """What `open_model(name)` is about to do, for the line above its progress."""
    return EMBEDDED[name].opening() if name in EMBEDDED else f"load {name}"


def demo_recipe(name: str) -> dict[str, Any]:
    """The recipe of the demo on an embedded model, ready to be changed."""
    if name not in EMBEDDED:
        raise unknown_name("demo model", name, EMBEDDED)
    found = EMBEDDED[name]
    return {
        "model": name, "task": {"name": found.task}, "score": {"criterion": found.criterion, "batches": found.batches},
        "plan": {"allocation": "global", "granularity": "query_head", "trials": TRIALS},
        "prune": {"feed_forward": found.feed_forward}, "output": f"runs/{name}",
    }  # fmt: skip


def default_task(name: str) -> str:
    """The task of an embedded model, or the one that comes with headprune for models like `name`. InvalidInput where none does."""
    if name in EMBEDDED:
        return EMBEDDED[name].task
    folder = model_folder(name, weights=False)
    config = load_config(folder)
    model, example = class_of(config), None
    if model.main_input_name in SOUND:
        if not (model.main_input_name == "input_features" and getattr(config, "is_encoder_decoder", False)):
            raise InvalidInput(f"no task of headprune's own is for a {model.__name__}; write one (docs/evaluation.md).")
        example = "speech-recognition,calibration=train.csv"
    elif model.main_input_name != "input_ids":
        example = "image-classification,calibration=FOLDER"
    elif "QuestionAnswering" in model.__name__:
        example = "question-answering,calibration=train.jsonl"
    elif "TokenClassification" in model.__name__:
        example = "token-classification,calibration=train.jsonl"
    elif "Classification" in model.__name__:
        example = "text-classification,calibration=train.jsonl"
    elif getattr(config, "is_encoder_decoder", False) and model.can_generate():
        example = "text-to-text,calibration=train.jsonl"
    embeds = (folder / "modules.json").is_file()  # sentence-transformers', of an embedder that may be saved as a language model
    if "MaskedLM" in model.__name__ and not embeds:
        example = "masked-text,calibration=train.txt"
    if example is not None:
        raise InvalidInput(f"no task of headprune's own is for a {model.__name__}; name yours, for example {example}.")
    return EMBEDDED["stdlib-lm" if model.can_generate() and not embeds else "minilm"].task


def open_model(
    name: str, progress: Progress | None = None, device: torch.device | str = "cpu", base: bool = False, bits: int | None = None
) -> tuple[PreTrainedModel, Any]:
    """(model in eval mode, tokenizer or None) of `name`, see `model_folder`; base: as in `hp.load`. bits: 4 or 8, of the weights as
    bitsandbytes quantises them."""
    if bits is not None:
        refuse_bits(bits)
    folder = model_folder(name, progress)
    if bits is None:
        whole: Any = load(folder, base=base)
        model = whole.to(device)
    else:
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
        model = load(folder, base=base, quantization_config=config, device_map={"": device})
    return model.eval(), tokenizer_of(folder, classifies_images(model))


def refuse_bits(bits: int) -> None:
    """InvalidInput where weights cannot be loaded in so many bits."""
    if bits not in (4, 8):
        raise InvalidInput(f"bits={bits}; expected 4 or 8.")
    missing = [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]
    if missing:
        raise InvalidInput(f"weights in {bits} bits need {' and '.join(missing)}: pip install 'headprune[bits]'.")


def open_from_disk(name: str, device: torch.device | str = "cpu", base: bool = False) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer or None) of `name`, whose weights are read layer by layer as it runs (`hp.open_streamed`)."""
    folder = model_folder(name)
    model = open_streamed(folder, device=device, base=base)
    return model, tokenizer_of(folder, classifies_images(model))


def classifies_images(model: PreTrainedModel) -> bool:
    """Whether it reads images alone, though its folder may hold a tokenizer too, as those of CLIP and SigLIP do."""
    return "ImageClassification" in type(model).__name__


def tokenizer_of(folder: Path, images: bool = False) -> Any:
    """The tokenizer, or where there is none, or `images` are read, the image processor; None where there is neither. Raises
    CorruptCheckpoint where there is one that does not load."""
    pictures = (folder / "preprocessor_config.json").exists() or (images and (folder / "processor_config.json").exists())
    text = any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")) and not (images and pictures)
    if not text and not pictures:
        return None
    kinds: list[Any] = [AutoTokenizer] if text else [AutoImageProcessor, AutoFeatureExtractor]  # of sound, in a file of that name
    failures = []
    for kind in kinds:
        try:
            return kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a class of tokenizers raises on files that it cannot read
            failures.append(error)
    reason = " ".join(str(failures[0]).split())[:300]
    what = "tokenizer" if text else "image processor"
    raise CorruptCheckpoint(f"the {what} in {folder} does not load: {type(failures[0]).__name__}: {reason}.") from failures[0]
