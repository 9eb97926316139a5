"""Texts of different lengths in one batch."""

from __future__ import annotations

from typing import Any

from headprune.errors import InvalidInput


def refuse_without_padding(tokenizer: Any, name: str) -> None:
    """InvalidInput where `tokenizer` has no token to fill the shorter texts of a batch up with (GPT-2, Llama)."""
    if getattr(tokenizer, "pad_token_id", 0) is None:
        raise InvalidInput(
            f"{name} puts texts of different lengths into a batch, and the tokenizer has no padding token. Set one "
            "(tokenizer.pad_token = tokenizer.eos_token) and save it beside the model."
        )
