import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letter_tokenizer import letter_tokenizer
from tiny_models import VOCABULARY, bert, llama

from headprune.errors import InvalidInput
from headprune.evaluation import Perplexity
from headprune.evaluation.perplexity import windows


class Letters:
    """A token for each character."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [1 + ord(letter) % (VOCABULARY - 1) for letter in text]}


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."


def by_definition(model, tokens, window, stride, begin=()):
    """Token by token: each is predicted in the first window that holds it, from what stands before it there."""
    losses, counted = [], set()
    for start in range(0, len(tokens), stride):
        for place in range(start + (not begin), min(start + window, len(tokens))):
            if place not in counted:
                with torch.no_grad():
                    logits = model(torch.tensor([[*begin, *tokens[start:place]]])).logits[0, -1]
                losses.append(-float(logits.log_softmax(dim=-1)[tokens[place]]))
            counted.add(place)
        counted.add(start)
        if start + window >= len(tokens):
            break
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("window", "stride", "batch"), [(16, None, 3), (16, 16, 1), (16, 5, 4), (24, 7, 2), (128, None, 2)])
def test_perplexity_is_by_definition(window, stride, batch):
    model, data = llama(), Perplexity(TEXT, Letters(), window=window, stride=stride, batch=batch)
    tokens = data.tokens.tolist()
    found = data.evaluate(model)
    assert found["perplexity"] == pytest.approx(by_definition(model, tokens, window, stride or window), rel=1e-4)
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize(("window", "stride", "batch"), [(16, None, 3), (16, 16, 1), (16, 5, 4), (128, None, 2), (2, None, 8)])
def test_each_window_is_read_behind_the_token_that_begins_every_text(window, stride, batch):
    model, data = llama(), Perplexity(TEXT.lower(), letter_tokenizer(begin=True), window=window, stride=stride, batch=batch)
    tokens, inside = data.tokens.tolist(), window - 1
    assert 29 not in tokens
    expected = by_definition(model, tokens, inside, min(stride or inside, inside), begin=(29,))
    assert data.evaluate(model)["perplexity"] == pytest.approx(expected, rel=1e-4)


@given(st.integers(2, 300), st.integers(2, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_is_counted_once_unless_it_has_no_context(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    counted = [place for one in windows(tokens, window, stride) for place in range(max(one.first, one.start + 1), one.end)]
    assert len(counted) == len(set(counted))
    without_context = {0} if stride < window else set(range(0, tokens, window))
    assert set(counted) == set(range(tokens)) - without_context


def test_a_file_texts_and_rows_of_a_dataset_are_read(tmp_path):
    (tmp_path / "text.txt").write_text(f"{TEXT}\n\n{TEXT}", encoding="utf-8")
    tokens = [
        Perplexity(source, Letters()).tokens.tolist()
        for source in (tmp_path / "text.txt", f"{TEXT}\n\n{TEXT}", [TEXT, TEXT], [{"text": TEXT, "id": 1}, {"text": TEXT, "id": 2}])
    ]
    assert all(found == tokens[0] for found in tokens)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        Perplexity(tmp_path / "none.txt", Letters())
    with pytest.raises(InvalidInput, match="has 1 tokens"):
        Perplexity("a", Letters())
    with pytest.raises(InvalidInput, match="stride=9"):
        Perplexity(TEXT, Letters(), window=8, stride=9)
    with pytest.raises(InvalidInput, match="has 200 tokens, and LlamaForCausalLM takes at most 128; give window=128"):
        Perplexity(TEXT * 3, Letters(), window=200).evaluate(llama())
    with pytest.raises(InvalidInput, match="BertModel is none"):
        Perplexity(TEXT, Letters()).evaluate(bert())
