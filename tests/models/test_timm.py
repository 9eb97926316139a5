"""timm's vision transformers: the real ones where timm is installed, and modules of the same make everywhere."""

import pytest
import torch
from timm_models import timm_module
from torch import nn

import headprune as hp
from headprune.models.tiny_inputs import tiny_inputs


class Attention(nn.Module):
    """As in timm/layers/attention.py."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.scale = num_heads, dim // num_heads, dim, (dim // num_heads) ** -0.5
        self.fused_attn = True
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)
        self.q_norm, self.norm, self.gate = nn.LayerNorm(self.head_dim), nn.Identity(), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2)
        return self.proj_drop(self.proj(self.norm(x.reshape(batch, tokens, self.attn_dim))))


class WindowAttention(nn.Module):
    """As in timm/models/swin_transformer.py; windows of 4 tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused_attn = num_heads, (dim // num_heads) ** -0.5, True
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, num_heads))
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(1, (-1, 4)).flatten(0, 1)
        q, k, v = self.qkv(windows).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        place = torch.arange(4)
        bias = self.relative_position_bias_table[place[:, None] - place + 3].permute(2, 0, 1)[None]
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(found)).view_as(x)


class Model(nn.Module):
    def __init__(self, attention: type) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(attention(16, 4) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=1))


def real(name: str, **options):
    def make() -> nn.Module:
        module = timm_module(name)
        torch.manual_seed(0)
        kind = {"vision_transformer": "VisionTransformer", "swin_transformer": "SwinTransformer"}[name]
        return getattr(module, kind)(img_size=16, num_classes=3, **options)

    return make


MODELS = {
    "like Attention": (lambda: Model(Attention), (3, 8, 16)),
    "like WindowAttention": (lambda: Model(WindowAttention), (3, 8, 16)),
    "vit": (real("vision_transformer", patch_size=4, embed_dim=32, depth=2, num_heads=4, qk_norm=True), (3, 3, 16, 16)),
    "swin": (real("swin_transformer", patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(4, 4), window_size=4), (3, 3, 16, 16)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep", [[0, 2], [3], []])
def test_cutting_equals_gating(name, keep):
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    plan = {site.name: keep if index % 2 else [1, 3] for index, site in enumerate(hp.attention_sites(model))}
    with torch.no_grad():
        dense = model(x)
        with hp.gated(model, plan):
            expected = model(x)
        hp.cut(model, plan, run=lambda model: model(x))
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert (dense - expected).abs().max() > 1e-3
        assert model.train()(x).isfinite().all()
    assert [site.head_map.query_heads for site in hp.attention_sites(model)][:2] == [2, len(keep)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep", [[0, 2], []])
def test_a_pruned_model_comes_back_from_the_disk(name, keep, tmp_path):
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    hp.cut(model, {hp.attention_sites(model)[0].name: keep}, run=lambda model: model(x))
    found = hp.load(hp.save(model, tmp_path / "out"), model=make())
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert [site.head_map for site in hp.attention_sites(found)] == [site.head_map for site in hp.attention_sites(model)]


def test_a_pooling_attention_is_left_whole_and_named_once(caplog):
    make = real("vision_transformer", patch_size=4, embed_dim=32, depth=2, num_heads=4, global_pool="map", class_token=False)
    model = make().eval()
    before = {name: value.clone() for name, value in model.attn_pool.state_dict().items()}
    sites = [site.name for site in hp.attention_sites(model)]
    assert sites == ["blocks.0.attn", "blocks.1.attn"]
    hp.cut(model, {site: [1, 3] for site in sites})
    assert all(torch.equal(value, before[name]) for name, value in model.attn_pool.state_dict().items())
    assert [record.getMessage() for record in caplog.records if "attn_pool" in record.getMessage()] == [
        "attn_pool (AttentionPoolLatent) pools by attention and keeps all of its 4 heads"
    ]


REFUSED = {
    "beit": ("beit", "Beit", r"q_bias \[32\] may belong to single heads"),
    "eva": ("eva", "Eva", "no adapter knows .*EvaAttention"),
    "relpos": ("vision_transformer_relpos", "VisionTransformerRelPos", "no adapter knows .*RelPosAttention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_timms_other_attentions_are_refused_by_name(name):
    module, kind, reason = REFUSED[name]
    model = getattr(timm_module(module), kind)(img_size=16, num_classes=3, patch_size=4, embed_dim=32, depth=1, num_heads=4)
    with pytest.raises(hp.UnsupportedModel, match=reason):
        hp.attention_sites(model)


def loss(reduction: str):
    return lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction=reduction)


@pytest.mark.parametrize("name", MODELS)
def test_gate_gradients_are_of_whole_pictures(name):
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "labels": torch.arange(3)}
    rows = [{key: value[[row]] for key, value in batch.items()} for row in range(3)]
    together, alone = (hp.observe(model, found, {"gate_gradient"}, loss_fn=loss("none")) for found in ([batch], rows))
    mean = hp.observe(model, [batch], {"gate_gradient"}, loss_fn=loss("mean"))
    for site in together:
        assert together[site].gate_gradient.shape == (3, 4)
        for other in (alone, mean):
            assert torch.allclose(together[site].gate_gradient, other[site].gate_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module: setattr(module, "norm", nn.LayerNorm(16)), "norm over all heads"),
        (lambda module: setattr(module, "gate", nn.Linear(16, 16)), "gate behind its heads"),
        (lambda module: setattr(module, "q_bias", nn.Parameter(torch.zeros(16))), "may belong to single heads"),
    ],
)
def test_what_mixes_heads_or_is_not_known_is_refused(change, reason):
    model = Model(Attention)
    change(model.blocks[1])
    with pytest.raises(hp.UnsupportedModel, match=reason):
        hp.attention_sites(model)


def test_the_check_before_a_cut_has_a_picture():
    assert tiny_inputs(MODELS["vit"][0]())["x"].shape == (1, 3, 16, 16)
