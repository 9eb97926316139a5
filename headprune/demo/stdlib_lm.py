"""A small Llama-style decoder, trained on this Python's standard library and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headprune.demo.training import Training, train
from headprune.evaluation.tasks.standard_library import Document, digest, standard_library_text
from headprune.evaluation.tasks.standard_library_text import stream_of
from headprune.surgery import save

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
log = logging.getLogger("headprune")


@dataclass(frozen=True)
class Decoder:
    """The model that is trained: grouped-query attention, tied embeddings, a byte-level BPE vocabulary."""

    vocabulary: int = 2048
    hidden: int = 256
    feed_forward: int = 512
    layers: int = 4
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    training: Training = field(default_factory=Training)


def stdlib_lm_path(progress: Callable[[int, int], None] | None = None, decoder: Decoder = Decoder()) -> Path:
    """The folder of the decoder (model and tokenizer), trained first where the cache holds none for this Python's library.

    Training is the same every time on the same machine, and one that was killed goes on from its last saved state.
    progress: called with (steps done, steps). Raises HeadpruneError where the cache folder cannot be written.
    """
    folder = cached_folder(decoder)
    if (folder / "config.json").exists():
        return folder
    documents = standard_library_text().training
    log.info("training stdlib-lm on %d documents (digest %s) into %s", len(documents), digest(documents)[:16], folder)
    tokenizer = byte_level_bpe(documents, decoder.vocabulary)
    model = initial_model(decoder, tokenizer)
    state = folder.with_name(f"{folder.name}.training")
    train(model, stream_of(tokenizer, documents), decoder.training, state, progress)
    save(model, folder, tokenizer=tokenizer)
    state.unlink(missing_ok=True)
    return folder


def cached_folder(decoder: Decoder = Decoder()) -> Path:
    """Where the decoder of this text and these settings is kept: below $XDG_CACHE_HOME, else ~/.cache."""
    settings = json.dumps(asdict(decoder), sort_keys=True) + digest(standard_library_text().training)
    name = f"stdlib-lm-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headprune" / name


def byte_level_bpe(documents: tuple[Document, ...], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens, all 256 bytes among them, learnt from `documents`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING, padding_side="left"
    )


def initial_model(decoder: Decoder, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Seeded random weights; the random state outside is left alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=decoder.hidden,
        intermediate_size=decoder.feed_forward,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.query_heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        max_position_embeddings=decoder.training.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoder.training.seed)
        return LlamaForCausalLM(config)
