"""How an embedder makes one vector of a text: as sentence-transformers wrote beside the model, else as its kind does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.files import parsed_json
from headprune.hub import known_folder

POOLING, PROMPTS, MODULES = "1_Pooling/config.json", "config_sentence_transformers.json", "modules.json"
OURS = ("Transformer", "Pooling", "Normalize")  # kinds of modules there that embeddings are made with here
# Names there (older: "pooling_mode_cls_token": true, newer: "pooling_mode": "cls") -> ours.
KNOWN = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "mean": "mean", "cls": "cls"}
DOCUMENT = ("document", "passage", "corpus")  # what its prompt may be called
log = logging.getLogger("headprune")


def written_pooling(tokenizer: Any) -> str | None:
    """The pooling that the folder `tokenizer` came from tells; None where it does not. InvalidInput for one that we do not have."""
    content = mapping_of(tokenizer, POOLING)
    mode = content.get("pooling_mode") or [name for name, on in content.items() if on is True and name.startswith("pooling_mode_")]
    modes = [mode] if isinstance(mode, str) else mode
    if not (isinstance(modes, list) and all(isinstance(one, str) for one in modes)):
        raise CorruptCheckpoint(f"{Path(tokenizer.name_or_path) / POOLING}: pooling_mode is {mode!r:.60}; expected a name.")
    asked = [name.removeprefix("pooling_mode_") for name in modes]
    if not asked:
        return None
    if len(asked) > 1 or asked[0] not in KNOWN:
        raise InvalidInput(
            f"{Path(tokenizer.name_or_path) / POOLING} pools by {' and '.join(asked)}; expected one of {', '.join(KNOWN)}. Give "
            "pooling=mean, cls or last to measure by that."
        )
    return KNOWN[asked[0]]


def written_prompts(tokenizer: Any) -> tuple[str, str]:
    """(what is put before each query, before each document) by the folder `tokenizer` came from; empty where it tells nothing."""
    prompts = mapping_of(tokenizer, PROMPTS).get("prompts") or {}
    if not (isinstance(prompts, dict) and all(isinstance(text, str | None) for text in prompts.values())):
        raise CorruptCheckpoint(f"{Path(tokenizer.name_or_path) / PROMPTS}: prompts is {prompts!r:.60}; expected texts by name.")
    return prompts.get("query") or "", next((prompts[name] for name in DOCUMENT if prompts.get(name)), "")


def tell_left_out(tokenizer: Any) -> None:
    """A line in the log where the folder `tokenizer` came from makes its embeddings with more than we do."""
    modules = content_of(tokenizer, MODULES)
    kinds = [str(one["type"]).rpartition(".")[2] for one in modules if "type" in one] if isinstance(modules, list) else []
    more = [kind for kind in kinds if kind not in OURS]
    if mapping_of(tokenizer, POOLING).get("include_prompt") is False:
        more.append("pooling without the prompt's tokens")
    if more:
        log.warning(
            "%s: sentence-transformers also applies %s, which is not done here: quality is of the embeddings without it.",
            tokenizer.name_or_path, ", ".join(more),
        )  # fmt: skip


def mapping_of(tokenizer: Any, file: str) -> dict[str, Any]:
    found = content_of(tokenizer, file)
    return found if isinstance(found, dict) else {}


def content_of(tokenizer: Any, file: str) -> Any:
    """Of a JSON file in the folder `tokenizer` came from; None where there is none."""
    folder = known_folder(getattr(tokenizer, "name_or_path", None))
    if folder is None or not (folder / file).is_file():
        return None
    path = folder / file
    try:
        return parsed_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is not JSON: {error}.") from None


def usual_pooling(model: nn.Module) -> str:
    """last for a causal decoder, of which no other token has seen the whole text; else mean."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return "last" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "mean"
