"""Heads switched off on a GPU at batch 1, bf16, random weights: against one forward pass for each mask."""

import pytest
import torch
from bench_cpu_masks import one_by_one
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from headprune.models import attention_sites
from headprune.scoring.head_masks import by_site, head_counts, one_out, random_masks
from headprune.scoring.masked_losses import masked_losses
from headprune.scoring.sample_losses import OwnLoss

pytestmark = pytest.mark.gpu


def bert_base():
    model = BertForSequenceClassification(BertConfig(num_labels=3))
    labels = torch.zeros(1, dtype=torch.long, device="cuda")
    return model, {"input_ids": torch.randint(1000, 20000, (1, 128), device="cuda"), "labels": labels}


def llama():
    """Half of the layers: the loop over all heads takes a minute otherwise."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=32000,
    )  # fmt: skip
    ids = torch.randint(1000, 20000, (1, 128), device="cuda")
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


SHAPES = {"BERT-base shape 12x12 heads": bert_base, "Llama-3.2-1B shape, 8 of 16 layers, 8x32 heads": llama}


@pytest.mark.parametrize("name", SHAPES)
def test_leave_one_out(versus, name):
    model, batch = SHAPES[name]()
    model = model.eval().to("cuda", torch.bfloat16)
    counts = head_counts(attention_sites(model))
    masks = by_site(one_out(counts), counts)
    versus(
        f"leave-one-out, {name}, 1 x 128 tokens", lambda: masked_losses(model, batch, masks),
        {"naive loop": lambda: one_by_one(model, OwnLoss(), batch, masks)}, at_least=5.0, rounds=2, graphs=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_random_masks(versus, name):
    model, batch = SHAPES[name]()
    model = model.eval().to("cuda", torch.bfloat16)
    counts = head_counts(attention_sites(model))
    masks = by_site(random_masks(counts, 512, 0.8, torch.Generator().manual_seed(0)), counts)
    versus(
        f"512 random masks of one sample, {name}, 128 tokens", lambda: masked_losses(model, batch, masks),
        {"512 forwards": lambda: one_by_one(model, OwnLoss(), batch, masks)}, rounds=2, graphs=False,
    )  # fmt: skip
