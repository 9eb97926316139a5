"""A tokenizer of lower-case letters and blanks, for the vocabulary of the tiny models."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def letter_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """begin: puts <s> before every text, as Llama's does."""
    vocabulary = {"[UNK]": 0, "</s>": 1, **{letter: number + 2 for number, letter in enumerate(LETTERS)}}
    if begin:
        vocabulary["<s>"] = 29
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 29)])
        return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>", unk_token="[UNK]")
