"""Texts as one row of tokens, in little memory however long they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Characters. Tokenizers keep some 200 bytes for each of a call's, and share out the texts of a call among their threads.
PIECE, CALL = 1 << 20, 1 << 22


def token_stream(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """The texts' tokens in one row [tokens], int64, each behind the end-of-text token where there is one. Texts of more than PIECE
    characters are cut before a space, where tokenizers of words cut too."""
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = [torch.tensor([], dtype=torch.long)]
    for pieces in calls(piece for text in texts for piece in pieces_of(text)):
        encoded = tokenizer([piece for piece, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
        found += [torch.tensor(start * first + ids, dtype=torch.long) for ids, (_, first) in zip(encoded, pieces)]
    return torch.cat(found)


def begin_of(tokenizer: Any) -> Tensor:
    """The token that `tokenizer` puts before every text (Llama, Gemma) [1], int64; [0] where it puts none there."""
    begin = getattr(tokenizer, "bos_token_id", None)
    puts_it = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    return torch.tensor([begin] if puts_it else [], dtype=torch.long)


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """[tokens], int64, of one text, cut as in `token_stream`."""
    if len(text) <= PIECE:
        return torch.as_tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long).flatten()
    encoded = (
        tokenizer([piece for piece, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
        for pieces in calls(pieces_of(text))
    )
    return torch.cat([torch.tensor(ids, dtype=torch.long) for several in encoded for ids in several])


def pieces_of(text: str) -> Iterator[tuple[str, bool]]:
    """(a piece of at most PIECE characters, whether it is the first)."""
    begin = 0
    while len(text) - begin > PIECE:
        places = (text.rfind(mark, begin + PIECE // 2, begin + PIECE) for mark in (" ", "\n"))
        end = next((place for place in places if place >= 0), begin + PIECE)
        yield text[begin:end], begin == 0
        begin = end
    yield text[begin:], begin == 0


def calls(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces together up to CALL characters."""
    some: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        if some and size + len(piece[0]) > CALL:
            yield some
            some, size = [], 0
        some.append(piece)
        size += len(piece[0])
    if some:
        yield some
