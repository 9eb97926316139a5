"""The check before a cut: as sharp in bf16 and fp16 as in fp32, and what happens to attentions that no input reaches."""

import copy
import dataclasses
import logging

import pytest
import torch
import transformers
from tiny_decoders import FAMILIES, decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_segmenters import SEGMENTERS
from tiny_vision_language import VISION_LANGUAGE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import headprune as hp
from headprune.errors import UnsupportedModel
from headprune.models.tested import TESTED
from headprune.surgery.cut import cut_site
from headprune.surgery.rehearse import rehearse
from headprune.surgery.stand_in import on_stand_ins, widened


def of_headprune(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "headprune"]


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def ordinary_llama() -> LlamaForCausalLM:
    """As transformers initialises it: small weights, whose attention is nearly even."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=500
        )
    ).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layout_that_is_wrong_is_seen_in_every_dtype(dtype):
    """Key heads 0 and 1 swapped."""
    model = ordinary_llama().to(dtype)
    site = hp.attention_sites(model)[0]
    key = site.projection("key")
    swapped = dataclasses.replace(key, features=key.features[[1, 0, 2, 3]])
    wrong = dataclasses.replace(site, projections=tuple(swapped if part.role == "key" else part for part in site.projections))
    with pytest.raises(UnsupportedModel, match="gives something else when heads are cut"):
        rehearse(model, [(wrong, (0, 1))], cut_site, None, True)
    rehearse(model, [(site, (0, 1))], cut_site, None, True)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "falcon_gqa",
        "gemma3",
        "gpt_oss",
        "deepseek_v3",
        "bert",
        "layoutlmv2",
        "layoutlmv3",
        "wavlm",
        "xlnet",
        "levit",
        "prophetnet",
        "t5",
        "clip",
        "swin",
        "qwen3_vl",
    ],
)
def test_every_layout_passes_in_half_precision_and_the_model_keeps_its_dtype(family, dtype, caplog):
    makers = {**ENCODERS, **SEQ2SEQ, **VISION, **VISION_LANGUAGE}
    model = (makers[family].make() if family in makers else decoder(family)).to(dtype)
    keep = {site.name: [0, 2] for site in hp.attention_sites(model)}
    with caplog.at_level(logging.WARNING, "headprune"):
        hp.cut(model, keep)
    assert not of_headprune(caplog)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {site.head_map.query_heads for site in hp.attention_sites(model)} == {2}


def test_a_stand_in_is_wider_and_leaves_the_attention_alone():
    model = ordinary_llama().to(torch.bfloat16)
    site = hp.attention_sites(model)[0]
    weight = site.module.q_proj.weight
    twin = on_stand_ins(site, widened)
    assert twin.module.q_proj.weight.dtype == torch.float32
    assert torch.equal(twin.module.q_proj.weight, weight.float())
    twin.module.q_proj.register_forward_pre_hook(lambda *_: None)
    cut_site(twin, (0,))
    assert site.module.q_proj.weight is weight
    assert not site.module.q_proj._forward_pre_hooks


class OwnLlamaAttention(LlamaAttention):
    """Built like a known attention, and not of its class."""


class Unreached(nn.Module):
    """A model that no input is known for."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.inner = ordinary_llama()
        if own:
            for layer in self.inner.model.layers:
                layer.self_attn.__class__ = OwnLlamaAttention

    def forward(self, ids):
        return self.inner(ids, use_cache=False).logits


KEEP = {"inner.model.layers.0.self_attn": [0, 1], "inner.model.layers.1.self_attn": [2, 3]}


def test_of_a_tested_kind_that_no_input_reaches_the_log_names_every_site(caplog):
    model = Unreached(own=False)
    with caplog.at_level(logging.WARNING, "headprune"):
        hp.cut(model, KEEP)
    (line,) = of_headprune(caplog)
    assert line.startswith("not checked before the cut")
    assert all(f"{name} (LlamaAttention)" in line for name in KEEP)


def test_of_another_kind_it_is_refused_until_a_forward_pass_or_the_user_vouches(caplog):
    model = Unreached(own=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModel, match=r"0.self_attn \(OwnLlamaAttention\) .* Give run=.* verify=False cuts it unchecked"):
        hp.cut(model, KEEP)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = torch.arange(12).view(2, 6)
    checked, unchecked, calibrated = (copy.deepcopy(model) for _ in range(3))
    with caplog.at_level(logging.WARNING, "headprune"):
        hp.cut(checked, KEEP, run=lambda model: model(ids))
        hp.cut(unchecked, KEEP, verify=False)
        plan = hp.PruningPlan.from_keep(calibrated, KEEP)
        batches = [torch.randint(0, 500, (8, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        hp.prune(calibrated, plan, batches, forward=lambda model, ids: model(ids), token_mask=lambda ids: None)
    assert not of_headprune(caplog)
    assert torch.equal(checked(ids), unchecked(ids))


def test_the_tested_kinds_are_those_of_the_families_in_the_tests():
    others = ENCODERS | SEQ2SEQ | VISION | VISION_LANGUAGE | SEGMENTERS
    models = [decoder(family) for family in FAMILIES]
    models += [family.make(implementation) for family in others.values() for implementation in family.implementations]
    assert {type(site.module).__name__ for model in models for site in hp.attention_sites(model)} == set(TESTED["transformers"])


SOUND = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LISTENERS = {
    "Wav2Vec2Model": ("Wav2Vec2Config", {**SMALL, **SOUND}),
    "HubertModel": ("HubertConfig", {**SMALL, **SOUND}),
    "ASTModel": ("ASTConfig", {**SMALL, "max_length": 32, "num_mel_bins": 16}),
    "LasrEncoder": ("LasrEncoderConfig", {**SMALL, "num_mel_bins": 16, "subsampling_conv_channels": 8}),
    "Speech2TextModel": (
        "Speech2TextConfig",
        {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "conv_channels": 16, "input_feat_per_channel": 8, "vocab_size": 61, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        },
    ),
}  # fmt: skip


def listener(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, options = LISTENERS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize("name", LISTENERS)
def test_the_check_has_an_input_for_models_that_listen(name, caplog):
    model = listener(name)
    with caplog.at_level(logging.WARNING, "headprune"):
        hp.cut(model, {site.name: [0, 2] for site in hp.attention_sites(model)})
    assert not of_headprune(caplog)


PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "num_attention_heads": [4, 4],
    "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
}  # fmt: skip


@pytest.mark.parametrize("name", ["Segformer", "GLPN"])
def test_the_check_has_an_input_for_models_that_take_pictures_of_any_size(name, caplog):
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**PYRAMID)).eval()
    with caplog.at_level(logging.WARNING, "headprune"):
        hp.cut(model, {site.name: [0, 2] for site in hp.attention_sites(model)})
    assert not of_headprune(caplog)


def test_a_model_that_would_break_at_the_next_forward_pass_is_refused():
    """BitNet's norm over what all heads give is as wide as all of them."""
    options = {**SMALL, "num_key_value_heads": 4, "vocab_size": 61}
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**options)).eval()
    first = hp.attention_sites(model)[0]
    assert not first.proven
    with pytest.raises(UnsupportedModel, match=rf"{first.name} .* cannot be cut: without those heads it fails"):
        hp.cut(model, {first.name: [0, 1]})


def test_an_attention_with_parameters_that_no_adapter_knows_is_cut_only_where_a_forward_pass_proves_it():
    model = ordinary_llama()
    model.model.layers[0].self_attn.head_scale = nn.Parameter(torch.ones(8))
    known, unknown = ({f"model.layers.{layer}.self_attn": [0, 1]} for layer in (1, 0))
    holder = nn.Sequential(model)  # for which no input is known
    with pytest.raises(UnsupportedModel, match="is not a known attention, and no forward pass"):
        hp.cut(holder, {f"0.{name}": heads for name, heads in unknown.items()}, verify=False)
    hp.cut(model, known | unknown)  # nothing reads it
    assert [site.proven for site in hp.attention_sites(model)] == [False, True]


class HalfLlamaAttention(LlamaAttention):
    """As an attention function that has kernels for half precision alone."""

    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.dtype == torch.float32:
            raise ValueError("only fp16 and bf16 are supported")
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("proven", [True, False])
def test_an_attention_that_runs_in_half_precision_alone_is_checked_in_that_if_it_is_known(proven, caplog):
    model = ordinary_llama().to(torch.bfloat16)
    model.model.layers[0].self_attn.__class__ = HalfLlamaAttention
    site = dataclasses.replace(hp.attention_sites(model)[0], proven=proven)
    with caplog.at_level(logging.WARNING, "headprune"):
        if proven:
            rehearse(model, [(site, (0, 1))], cut_site, None, True)
            (line,) = of_headprune(caplog)
            assert "does not run in fp32; its cut is checked in torch.bfloat16 only" in line
        else:
            with pytest.raises(UnsupportedModel, match=r"does not run in fp32.* Load the model with dtype=torch.float32"):
                rehearse(model, [(site, (0, 1))], cut_site, None, True)


def test_what_ran_before_a_forward_pass_failed_is_checked_all_the_same(caplog):
    model = Unreached(own=True)

    def run(model):
        model(torch.arange(6)[None])
        raise ValueError("the loss does not take this")

    with caplog.at_level(logging.WARNING, "headprune"):
        hp.cut(model, KEEP, run=run)
    assert of_headprune(caplog) == ["Unreached does not run on an input of the check before a cut: the loss does not take this"]
