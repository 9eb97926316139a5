"""Prune a plain PyTorch model: every nn.MultiheadAttention is replaced by one whose heads can be cut, with the same outputs.

    python examples/replace_torch_attention.py

Nothing of transformers is used. The model is yours; what headprune asks for is `loss_fn(model, batch)` and `forward(model, batch)`.
"""

import copy

import torch
import torch.nn.functional as F
from rich import print
from torch import Tensor, nn

import headprune as hp

Batch = tuple[Tensor, Tensor]


class Sorter(nn.Module):
    """For each number of a list its place when the list is sorted: [batch, 12] -> logits [batch, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(1, 48)
        layer = nn.TransformerEncoderLayer(48, 8, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.outside = nn.Linear(48, 12)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.outside(self.encoder(self.inside(numbers[..., None])))


def draw(count: int) -> list[Batch]:
    drawn = [torch.randn(64, 12) for _ in range(count)]
    return [(numbers, numbers.argsort(dim=1).argsort(dim=1)) for numbers in drawn]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of each list."""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(dim=1)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return float(torch.cat([(model(numbers).argmax(dim=-1) == places).float() for numbers, places in test]).mean())


torch.manual_seed(0)
model, train, test = Sorter(), draw(250), draw(10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(train))
for batch in train:
    optimizer.zero_grad()
    loss(model, batch).mean().backward()
    optimizer.step()
    schedule.step()
model.eval()
dense, expected = accuracy(model), model(test[0][0])

hp.nn.replace_multihead_attention(model)
print(model.encoder.layers[0].self_attn)
print(f"replaced: outputs differ by {(model(test[0][0]) - expected).abs().max():.0e}")

plan = hp.plan(hp.score(model, train[:8], criterion="fisher", loss_fn=loss), hp.Budget(heads=0.5))
print(plan)
cut = copy.deepcopy(model)
hp.cut(cut, plan, run=lambda model: model(test[0][0]))  # run: a pass on which each cut is compared with gating before it is made
hp.prune(model, plan, calibration=train[:8], forward=lambda model, batch: model(batch[0]))
print(f"accuracy: dense {dense:.3f}, cut {accuracy(cut):.3f}, re-solved {accuracy(model):.3f}")

hp.save(model, "pruned-sorter")
loaded = hp.load("pruned-sorter", model=Sorter())  # a fresh, unpruned one of the same class takes its heads and weights
print(f"loaded again: {accuracy(loaded):.3f}, {sum(weight.numel() for weight in loaded.parameters()):,} parameters")

# The module by itself: nn.MultiheadAttention's constructor and forward, and head counts that torch's has not.
layer = hp.nn.VariableHeadAttention(48, 4, batch_first=True, head_dim=16, head_map=hp.HeadMap((0, 0, 0, 1), 2))
layer.prune([0, 1, 3])
states = torch.randn(2, 5, 48)
print(f"by itself: {layer.head_map}, output {list(layer(states, states, states, need_weights=False)[0].shape)}")
