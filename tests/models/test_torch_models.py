"""Models built on torch.nn.MultiheadAttention, pruned as they are: nothing is to be swapped by hand."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny_models import PoolingByAttention
from torch import nn

import headprune as hp
from headprune.nn import VariableHeadAttention


class Encoder(nn.Module):
    """Reads padded batches: without gradients torch runs its fused kernel on nested tensors here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)
        self.head = nn.Linear(16, 3)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x, padding):
        kept = (~padding)[..., None]
        return self.head((self.encoder(x, src_key_padding_mask=padding) * kept).sum(dim=1) / kept.sum(dim=1))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.Transformer(16, 4, 1, 2, 32, dropout=0.0, batch_first=True)
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.arange(5) >= torch.tensor([5, 3, 2, 4])[:, None]
    return {"x": torch.randn(4, 5, 16, generator=generator), "padding": padding, "labels": torch.arange(4) % 3}


def sentences():
    torch.manual_seed(1)
    return {"source": torch.randn(3, 6, 16), "target": torch.randn(3, 5, 16)}


def loss(model, batch):
    return F.cross_entropy(model(batch["x"], batch["padding"]), batch["labels"], reduction="none")


KEEP = {"encoder.layers.0.self_attn": [1, 2], "encoder.layers.1.self_attn": [0]}


@pytest.mark.parametrize("grad", [True, False])
def test_a_pruned_encoder_is_its_gated_original(grad):
    model, inputs = Encoder().eval(), batch()
    call = (inputs["x"], inputs["padding"])
    with torch.set_grad_enabled(grad):
        dense = model(*call)
        with hp.gated(model, KEEP):
            expected = model(*call)
        assert torch.equal(model(*call), dense)
        hp.prune(model, hp.PruningPlan.from_keep(model, KEEP))
        assert torch.allclose(model(*call), expected, atol=1e-5)
    assert (dense - expected).abs().max() > 1e-2
    assert [layer.self_attn.num_heads for layer in model.encoder.layers] == [2, 1]


@pytest.mark.parametrize("emptied", [(), ("self_attn",), ("multihead_attn",)])
def test_cross_attention_is_pruned_too(emptied):
    model, inputs = Translator().eval(), sentences()
    names = [f"transformer.decoder.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "multihead_attn")]
    keep = {name: [] if name.rpartition(".")[2] in emptied else [index % 4] for index, name in enumerate(names)}
    with torch.no_grad():
        dense = model(**inputs)
        with hp.gated(model, keep):
            expected = model(**inputs)
        hp.cut(model, keep)
        assert torch.allclose(model(**inputs), expected, atol=1e-5)
    assert (dense - expected).abs().max() > 1e-2
    kinds = {site.name.rpartition(".")[2]: site.kind for site in hp.attention_sites(model) if "decoder" in site.name}
    assert kinds == {"self_attn": "self", "multihead_attn": "cross"}


def test_looking_leaves_torchs_layers_where_they_are():
    model = Encoder()
    before, optimizer = copy.deepcopy(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1)
    scores = hp.score(model, [batch()], criterion="fisher", loss_fn=loss)
    plan = hp.plan(scores, hp.Budget(heads=0.5))
    plan.check_fits(model)
    with hp.gated(model, KEEP):
        assert type(model.encoder.layers[0].self_attn) is VariableHeadAttention
    with pytest.raises(hp.InvalidPlan, match=r"layers\.7"):
        hp.cut(model, {"encoder.layers.7.self_attn": [0]})
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert model.encoder.use_nested_tensor
    assert model.encoder.layers[0].self_attn.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    loss(model, batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(before["encoder.layers.0.self_attn.in_proj_weight"], model.encoder.layers[0].self_attn.in_proj_weight)


def test_a_training_step_after_the_cut_lowers_the_loss():
    model = Encoder()
    hp.cut(model, KEEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = loss(model, batch()).mean()
    before.backward()
    optimizer.step()
    assert loss(model, batch()).mean() < before


def test_two_prunings_equal_one():
    twice, once, inputs = Encoder().eval(), Encoder().eval(), batch()
    hp.cut(twice, {"encoder.layers.0.self_attn": [0, 2, 3]})
    hp.cut(twice, {"encoder.layers.0.self_attn": [1]})
    hp.cut(once, {"encoder.layers.0.self_attn": [2]})
    assert torch.equal(twice(inputs["x"], inputs["padding"]), once(inputs["x"], inputs["padding"]))


def test_a_model_may_be_called_an_attention_itself():
    model = PoolingByAttention().eval()
    hp.cut(model, {"inner": [0, 2]})
    assert [site.name for site in hp.attention_sites(model)] == ["inner"]


def test_padding_under_torchs_own_name_counts_in_no_statistic():
    encoder, criteria = Encoder().encoder.eval(), ["entropy", "wanda", "output_norm", "least_squares"]
    short, longer = ({"src": torch.randn(4, length, 16), "src_key_padding_mask": batch()["padding"]} for length in (5, 8))
    longer["src"][:, :5] = short["src"]
    longer["src_key_padding_mask"] = F.pad(short["src_key_padding_mask"], (0, 3), value=True)
    loss = lambda model, batch: (model(**batch) * ~batch["src_key_padding_mask"][..., None]).square().sum(dim=(1, 2))  # noqa: E731
    one, other = (hp.score(encoder, [some], criteria, loss_fn=loss) for some in (short, longer))
    for name in criteria:
        for site in one[name]:
            torch.testing.assert_close(other[name][site], one[name][site], rtol=1e-3, atol=1e-5)
