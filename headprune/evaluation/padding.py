"""Whether the texts of a batch can be made equally long, and whether the model tells where each of them ends."""

from __future__ import annotations

from typing import Any

from torch import nn

from headprune.errors import InvalidInput
from headprune.evaluation.embedder import usual_pooling


def refuse_unpadded(tokenizer: Any) -> None:
    """InvalidInput where `tokenizer` has no token to pad with, as those of many decoders."""
    if getattr(tokenizer, "pad_token", "") is None:
        place = getattr(tokenizer, "name_or_path", "") or "this model"
        raise InvalidInput(
            f"the tokenizer of {place} has no padding token, by which the texts of a batch become equally long. Set "
            "tokenizer.pad_token, to tokenizer.eos_token where there is no better one, and save it in the model's folder."
        )


def refuse_other_padding(model: nn.Module, tokenizer: Any) -> None:
    """InvalidInput where `model`, a classifier that reads the last token of each text, takes padding for one: it knows padding
    by `config.pad_token_id`, `tokenizer` by its own."""
    config: Any = getattr(model, "config", None)
    if config is None or usual_pooling(model) != "last":
        return
    known, made = config.get_text_config().pad_token_id, tokenizer.pad_token_id
    if known is None or (known != made and tokenizer.padding_side == "right"):
        raise InvalidInput(
            f"{type(model).__name__} reads the last token of a text, and its config.pad_token_id is {known}, so it would read "
            f"padding where the tokenizer pads with {made}. Set model.config.pad_token_id = {made} and save the model."
        )
