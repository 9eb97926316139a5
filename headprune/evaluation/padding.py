"""Whether the texts of a batch can be made equally long, and whether the model tells where each of them ends."""

from __future__ import annotations

from typing import Any

from torch import nn

from headprune.errors import InvalidInput
from headprune.evaluation.embedder import usual_pooling


def refuse_without_padding(tokenizer: Any, name: str) -> None:
    """InvalidInput where `tokenizer` has no token to fill the shorter texts of a batch up with (GPT-2, Llama)."""
    if getattr(tokenizer, "pad_token_id", 0) is None:
        raise InvalidInput(
            f"{name} puts texts of different lengths into a batch, and the tokenizer has no padding token. Set one "
            "(tokenizer.pad_token = tokenizer.eos_token) and save it beside the model."
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
