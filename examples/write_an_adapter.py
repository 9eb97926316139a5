"""Write an adapter: teach headprune an attention that it does not recognise, here one of your own making.

    python examples/write_an_adapter.py

Its heads lie interleaved in one projection (value, query, key of head 0, then of head 1, ...), and each head owns a number besides.
The adapter says where everything of a head is; scoring, planning, compensation, cutting and checkpoints then work as ever.
"""

import copy

import torch
import torch.nn.functional as F
from rich import print
from torch import Tensor, nn

import headprune as hp
from headprune.models import HeadTensor
from headprune.models.site import heads_at


class ForgetfulAttention(nn.Module):
    """Attention whose heads look back with less and less interest, each at its own rate."""

    def __init__(self, hidden: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.mix = nn.Linear(hidden, heads * 3 * width)
        self.rate = nn.Parameter(torch.rand(heads))
        self.back = nn.Linear(heads * width, hidden)

    def forward(self, states: Tensor) -> Tensor:
        value, query, key = self.mix(states).unflatten(-1, (self.heads, 3, self.width)).permute(3, 0, 2, 1, 4)
        places = torch.arange(states.shape[1])
        bias = -self.rate[:, None, None] * (places[:, None] - places).abs()
        return self.back(F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2))


class ForgetfulAdapter:
    name = "forgetful"

    def site(self, name: str, module: nn.Module) -> hp.AttentionSite | None:
        """Where each head lives: by role its rows in `mix` and its columns in `back`, and what else it owns."""
        if not isinstance(module, ForgetfulAttention):
            return None
        heads, width = module.heads, module.width
        inside = [
            heads_at(role, f"{name}.mix", module.mix, heads, width, start=place * width, step=3 * width)
            for place, role in enumerate(("value", "query", "key"))
        ]
        out = heads_at("output", f"{name}.back", module.back, heads, width)
        hidden, rate = module.back.out_features, HeadTensor(f"{name}.rate", module, "rate")
        return hp.AttentionSite(
            name, module, module, hp.HeadMap.uniform(heads), width, width, hidden, "self", (*inside, out), extras=(rate,)
        )

    def after_cut(self, site: hp.AttentionSite, head_map: hp.HeadMap, kept: tuple[int, ...]) -> None:
        """The weights are smaller by now; this is what `forward` reads besides."""
        site.module.heads = head_map.query_heads


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), ForgetfulAttention(32, 8, 8), nn.GELU(), ForgetfulAttention(32, 8, 8), nn.Linear(32, 3))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Per sample: how far the outputs are from running means of the inputs."""
    means = batch[..., :3].cumsum(dim=1) / torch.arange(1, batch.shape[1] + 1)[:, None]
    return (model(batch) - means).square().mean(dim=(1, 2))


@torch.no_grad()
def mean_loss(model: nn.Module) -> float:
    return float(torch.cat([loss(model, batch) for batch in test]).mean())


model, batches, test = network(), *([torch.randn(16, 12, 6) for _ in range(count)] for count in (60, 20))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for batch in batches:
    optimizer.zero_grad()
    loss(model, batch).mean().backward()
    optimizer.step()

try:
    hp.attention_sites(model)
except hp.UnsupportedModel as error:
    print(f"before: {error}")
hp.register_adapter(ForgetfulAdapter())
print(f"after: {', '.join(f'{site.name} with {site.head_map.query_heads} heads' for site in hp.attention_sites(model))}")

plan = hp.plan(hp.score(model, batches[:20], "fisher", loss_fn=loss), hp.Budget(heads=0.5))
print(plan)
cut = copy.deepcopy(model)
hp.cut(cut, plan, run=lambda model: model(batches[0]))  # tried on this input first: an adapter that is wrong is refused
with torch.no_grad(), hp.gated(model, plan):
    print(f"cut = gated to within {(cut(test[0]) - model(test[0])).abs().max():.0e}")
dense = mean_loss(model)
hp.prune(model, plan, calibration=batches[:20], forward=lambda model, batch: model(batch))
print(f"loss: dense {dense:.4f}, cut {mean_loss(cut):.4f}, re-solved {mean_loss(model):.4f}")

hp.save(model, "pruned-forgetful")
same = torch.equal(hp.load("pruned-forgetful", model=network())(batches[0]), model(batches[0]))
print(f"loaded again into a fresh network: {'the same outputs' if same else 'other outputs'}")
