import random

import pytest
import torch
from letter_tokenizer import LETTERS, letter_tokenizer

from headprune.evaluation import token_stream as module
from headprune.evaluation.token_stream import pieces_of, token_stream, tokens_of

WORDS = ["".join(random.Random(seed).choices(LETTERS, k=5)) for seed in range(9)]
TEXTS = [" ".join(WORDS), " ".join(reversed(WORDS)), "", "x" * 70, "a\nb"]


@pytest.mark.parametrize("piece", [20, 7])
def test_long_texts_give_the_tokens_of_short_ones(monkeypatch, piece):
    tokenizer = letter_tokenizer()
    whole, single = token_stream(tokenizer, TEXTS), [tokens_of(tokenizer, text) for text in TEXTS]
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(module, "CALL", 3 * piece)
    assert torch.equal(token_stream(tokenizer, iter(TEXTS)), whole)
    assert all(torch.equal(tokens_of(tokenizer, text), found) for text, found in zip(TEXTS, single))
    assert int((whole == tokenizer.eos_token_id).sum()) == len(TEXTS)
    assert token_stream(tokenizer, []).tolist() == []


def test_pieces_end_before_a_space_where_there_is_one(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8)
    assert list(pieces_of("one two three fourteenth-and\nmore")) == [
        ("one two", True), (" three", False), (" fourtee", False), ("nth-and", False), ("\nmore", False),
    ]  # fmt: skip
