"""Heads switched off on the CPU, fp32: every head by itself, and random sets, against one forward pass for each.

Ours is the whole call, with what it needs to find out how the model runs.
"""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from headprune.models import attention_sites
from headprune.models.gating import gate_columns, output_input_hook
from headprune.scoring.head_masks import by_site, head_counts, one_out, random_masks
from headprune.scoring.masked_losses import masked_losses
from headprune.scoring.sample_losses import OwnLoss
from headprune.sources import open_model


def minilm(rows: int, tokens: int):
    """The packaged pretrained encoder, and the distance of mean embeddings from one direction."""
    model, _ = open_model("minilm")
    target = torch.randn(384, generator=torch.Generator().manual_seed(0))
    loss_fn = lambda model, batch: -torch.cosine_similarity(model(**batch).last_hidden_state.mean(dim=1), target)  # noqa: E731
    return model, loss_fn, {"input_ids": torch.randint(1000, 20000, (rows, tokens))}


def bert_base(rows: int, tokens: int):
    """The shape of BERT-base with random weights and a classifier."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=3)).eval()
    labels = torch.zeros(rows, dtype=torch.long)
    return model, OwnLoss(), {"input_ids": torch.randint(1000, 20000, (rows, tokens)), "labels": labels}


def one_by_one(model: nn.Module, loss_fn, batch: dict, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """A forward pass for each mask: the naive loop, with gates at those sites alone that a mask changes."""
    sites, rows = {site.name: site for site in attention_sites(model)}, []
    for mask in zip(*masks.values()):
        hooks = [
            output_input_hook(sites[name], gate_columns(gates[sites[name].head_of_column()]))
            for name, gates in zip(masks, mask)
            if bool((gates != 1).any())
        ]
        for hook in hooks:
            hook.__enter__()
        rows.append(loss_fn(model, batch))
        for hook in hooks:
            hook.__exit__(None, None, None)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "make", "rows", "tokens"),
    [
        ("MiniLM 6x12 heads", minilm, 1, 32),
        ("MiniLM 6x12 heads", minilm, 4, 32),
        ("BERT-base shape 12x12 heads, random weights", bert_base, 1, 16),
    ],
)
def test_leave_one_out(versus, name, make, rows, tokens):
    model, loss_fn, batch = make(rows, tokens)
    counts = head_counts(attention_sites(model))
    masks = by_site(one_out(counts), counts)
    versus(
        f"CPU leave-one-out, {name}, {rows} x {tokens} tokens", lambda: masked_losses(model, batch, masks, loss_fn=loss_fn),
        {"naive loop": lambda: one_by_one(model, loss_fn, batch, masks)}, at_least=1.8, rounds=2,
    )  # fmt: skip


def test_random_masks(versus):
    model, loss_fn, batch = minilm(1, 16)
    counts = head_counts(attention_sites(model))
    masks = by_site(random_masks(counts, 512, 0.8, torch.Generator().manual_seed(0)), counts)
    versus(
        "CPU 512 random masks of one sample, MiniLM, 16 tokens", lambda: masked_losses(model, batch, masks, loss_fn=loss_fn),
        {"512 forwards": lambda: one_by_one(model, loss_fn, batch, masks)}, rounds=2,
    )  # fmt: skip
