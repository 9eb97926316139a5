"""Which ids of a vocabulary are special tokens or punctuation."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput

PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class TokenKinds:
    """The ids of special tokens (padding, separators, beginning and end of a text) and of punctuation."""

    special: frozenset[int] = frozenset()
    punctuation: frozenset[int] = frozenset()

    @classmethod
    def of(cls, source: TokenKinds | Any) -> TokenKinds:
        """`source` itself, or what a tokenizer says: tokens of nothing but punctuation (and the marks of word boundaries).

        Raises InvalidInput where `source` is neither.
        """
        if isinstance(source, TokenKinds):
            return source
        if not hasattr(source, "get_vocab") or not hasattr(source, "all_special_ids"):
            raise InvalidInput(f"token_kinds is a {type(source).__name__}; expected a tokenizer or headprune's TokenKinds.")
        special = frozenset(source.all_special_ids)
        bare = {index: token.strip("\u0120\u2581 ").removeprefix("##") for token, index in source.get_vocab().items()}
        marks = frozenset(index for index, token in bare.items() if token and PUNCTUATION.issuperset(token))
        return cls(special, marks - special)

    def masks(self, ids: Tensor) -> dict[str, Tensor]:
        """Kind -> bool, of the shape of `ids`."""
        kinds = {"special": self.special, "punctuation": self.punctuation}
        return {kind: torch.isin(ids, torch.tensor(sorted(found), device=ids.device)) for kind, found in kinds.items()}


def input_ids_of(batch: Any) -> Tensor | None:
    """The batch's 2-D "input_ids", where it has them."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids if ids is not None and ids.dim() == 2 else None
