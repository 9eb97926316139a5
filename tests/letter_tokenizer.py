"""A tokenizer of lower-case letters and blanks, for the vocabulary of the tiny models."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def letter_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "</s>": 1, **{letter: number + 2 for number, letter in enumerate(LETTERS)}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>", unk_token="[UNK]")
