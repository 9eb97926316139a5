"""Tiny dense models with what was cut from them, and batches: what recovery starts from."""

import copy

import torch
from tiny_models import bert, llama, padded, tokens

import headprune as hp


def pruned_llama(seed: int = 0, **options):
    """(dense, pruned to ragged groups)."""
    dense = llama(seed=seed, **options)
    pruned = copy.deepcopy(dense)
    hp.cut(pruned, {"model.layers.0.self_attn": [0, 2, 3, 7], "model.layers.1.self_attn": [1, 4, 5]})
    return dense, pruned


def pruned_bert():
    """(dense, pruned), one head left in the last layer."""
    dense = bert()
    pruned = copy.deepcopy(dense)
    hp.cut(pruned, {"encoder.layer.0.attention": [0, 2, 3], "encoder.layer.1.attention": [1]})
    return dense, pruned


def text_batches(count: int = 6, batch: int = 4, length: int = 12):
    return [{"input_ids": ids, "labels": ids} for ids in (tokens(batch, length, seed) for seed in range(count))]


def padded_batches(count: int = 4):
    return [padded(4, 10 + number, "right") for number in range(count)]


class Classifier(torch.nn.Module):
    """A plain torch model around torch's own attention: features [batch, tokens, 16] -> 5 classes."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        layer = torch.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, features):
        return self.head(self.encoder(features).mean(dim=1))


def pruned_classifier():
    """(dense, pruned, batches of (features, labels), loss_fn)."""
    dense = Classifier().eval()
    pruned = copy.deepcopy(dense)
    hp.cut(pruned, {"encoder.layers.0.self_attn": [0, 3], "encoder.layers.1.self_attn": [1, 2, 3]})
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(6, 7, 16, generator=generator), torch.randint(0, 5, (6,), generator=generator)) for _ in range(4)]
    return dense, pruned, batches, lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
