"""A decoder that has learnt something: some seconds of training on this Python's standard library, a tokenizer with it."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import headprune as hp
from headprune.demo.stdlib_lm import Decoder, stdlib_lm_path
from headprune.demo.training import Training
from headprune.sources import open_model

TEXT = """def weighted_mean(values, weights):
    \"\"\"Return the mean of values, each counted by its weight.

    Raises ValueError if the weights sum to 0.\"\"\"
    total = sum(weights)
    if not total:
        raise ValueError('naïve weights: %r' % (weights,))
    return"""
DECODER = Decoder(vocabulary=512, hidden=128, feed_forward=256, training=Training(steps=300, window=128))


def trained() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """(dense, with half of its query heads gone by their magnitude, tokenizer)."""
    dense, tokenizer = open_model(str(stdlib_lm_path(decoder=DECODER)))
    smaller = copy.deepcopy(dense)
    hp.prune(smaller, hp.plan(hp.score(dense, criterion="magnitude_l2"), hp.Budget(heads=0.5)))
    return dense, smaller, tokenizer
