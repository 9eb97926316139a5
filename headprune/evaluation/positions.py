"""How many tokens a model has positions for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from headprune.errors import InvalidInput


def position_limit(model: nn.Module) -> int | None:
    """The most tokens of a text that `model` takes; None where its config does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    # RoBERTa and its like count positions from behind that of padding.
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module.num_embeddings == most)
    return most - max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def refuse_longer(batches: Iterable[Mapping[str, Tensor]], limit: int | None, model: nn.Module) -> None:
    """InvalidInput where a batch of token ids has more of them in a row than `model` has positions for."""
    longest = max((batch["input_ids"].shape[1] for batch in batches if "input_ids" in batch), default=0)
    if limit is not None and longest > limit:
        name = type(model).__name__
        raise InvalidInput(f"a text has {longest} tokens, and {name} takes at most {limit}; give max_tokens={limit}.")
