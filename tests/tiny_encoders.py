"""Tiny random encoders, encoder-decoders and vision models: what each family needs for the tests that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from tiny_models import VOCABULARY, padded, tokens
from torch import Tensor

EVERY = ("eager", "sdpa", "headprune")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 32, "num_labels": 5}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = 5


@dataclass(frozen=True)
class Family:
    """A tiny model: its class and config, a batch for it (padded on a side), and the attentions that it can run."""

    model: str
    config: str
    options: dict
    batch: Callable[[str], dict[str, Tensor]]
    implementations: tuple[str, ...] = EVERY

    def make(self, implementation: str | None = None, seed: int = 0) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.options)
        config._attn_implementation = implementation or self.implementations[0]
        return getattr(transformers, self.model)(config).eval()


def text_batch(side: str) -> dict[str, Tensor]:
    batch = padded(side=side)
    labels = torch.randint(0, LABELS, batch["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    return {**batch, "labels": labels.where(batch["attention_mask"].bool(), -100)}


def encoder(name: str, implementations: tuple[str, ...] = EVERY, **options) -> Family:
    return Family(f"{name}ForTokenClassification", f"{name}Config", {**TEXT, **options}, text_batch, implementations)


ENCODERS = {
    "bert": encoder("Bert", **QUIET),
    "roberta": encoder("Roberta", **QUIET),
    "electra": encoder("Electra", embedding_size=16, **QUIET),
    "distilbert": Family(
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        {
            "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY, "initializer_range": 0.2,
            "dropout": 0.0, "attention_dropout": 0.0, "num_labels": LABELS, "max_position_embeddings": 32,
        },
        text_batch,
    ),
    "deberta_v3": encoder(
        "DebertaV2", ("eager",), relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=False,
        norm_rel_ebd="layer_norm", type_vocab_size=0, position_biased_input=False, **QUIET,
    ),
    "deberta_v3_shared_keys": encoder(
        "DebertaV2", ("eager",), relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True,
        type_vocab_size=0, position_biased_input=False, **QUIET,
    ),
}  # fmt: skip


def target_batch(side: str) -> dict[str, Tensor]:
    """Encoder tokens with padding, and labels of another length whose last positions do not count."""
    labels = tokens(3, 6, seed=3)
    labels[1, 4:] = -100
    return {**padded(side=side), "labels": labels}


BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "init_std": 0.2, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 32,
}  # fmt: skip
SEQ2SEQ = {
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, target_batch),
    "mbart": Family("MBartForConditionalGeneration", "MBartConfig", BART, target_batch),
}
