"""Encoders whose outputs are no classes: whatever is pruned, the model is its gated original, after the disk too."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from tiny_encoders import BART, ENCODERS, EVERY, LISTENER, PICTURE, QUIET, SIZES, TEXT, VISION
from tiny_models import VOCABULARY, padded, tokens
from torch import Tensor

import headprune as hp
from headprune.surgery.modeling_headprune import shrink


@dataclass(frozen=True)
class Model:
    """config: its class. output: the name of what is compared. alone: the check before a cut has no input for it."""

    config: str
    options: dict
    inputs: Callable[[], dict[str, Tensor]]
    implementations: tuple[str, ...] = EVERY
    output: str = "last_hidden_state"
    alone: bool = False


def picture() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def patches() -> dict[str, Tensor]:
    """Of two pictures, and where they lie."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1, 1)
    values = torch.randn(2, 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": values, "pixel_position_ids": places}


def frames() -> dict[str, Tensor]:
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = 0
    values = torch.randn(3, 20, 10, generator=torch.Generator().manual_seed(1))
    return {"input_features": values * mask[..., None], "attention_mask": mask, "decoder_input_ids": tokens(3, 5)}


def looked_at() -> dict[str, Tensor]:
    """Texts that begin with a picture, of one token for the whole and one for each place."""
    ids = tokens(3, 9).clamp(max=59).masked_fill(torch.arange(9) < 5, 60)
    return {**picture(), "input_ids": ids, "decoder_input_ids": tokens(3, 4)}


def read() -> dict[str, Tensor]:
    """Texts that begin with four places for a picture, of which six patches are given, each behind its row and column."""
    places = torch.cartesian_prod(torch.arange(1.0, 3.0), torch.arange(1.0, 4.0)).expand(3, 6, 2)
    patches = torch.cat([places, torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(1))], dim=2)
    return {
        "flattened_patches": patches,
        "input_ids": tokens(3, 9),
        "image_embeds_position_mask": (torch.arange(9) < 4).expand(3, -1),
    }


def seen() -> dict[str, Tensor]:
    """Text, and what a detector found in a picture."""
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(3, 5, 4, generator=generator)
    return {**padded(), "visual_feats": torch.randn(3, 5, 7, generator=generator), "visual_pos": places}


SMALL = {**PICTURE, **SIZES, "patch_size": 8}
PARTS = {"text_config": {**SIZES, "vocab_size": VOCABULARY}, "image_config": SMALL, "multimodal_config": SIZES}
CONFORMER = {"layers": 1, "num_attention_heads": 4, "linear_units": 32, "kernel_size": 3}
FASTSPEECH = {
    "hidden_size": 32, "vocab_size": VOCABULARY, "num_mel_bins": 8, "speech_decoder_postnet_layers": 1,
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in CONFORMER.items()},
    "duration_predictor_channels": 16, "energy_predictor_channels": 16, "pitch_predictor_channels": 16,
    "pitch_predictor_layers": 1, "duration_predictor_layers": 1, "speech_decoder_postnet_units": 16, "initializer_range": 0.2,
}  # fmt: skip
SEAMLESS = {
    **SIZES, **LISTENER, "vocab_size": VOCABULARY, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_adapter_layers": 1, "pad_token_id": 0,
    "max_position_embeddings": 64, "speech_encoder_layerdrop": 0.0, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1,
    "t2u_encoder_attention_heads": 4, "t2u_decoder_attention_heads": 4, "t2u_encoder_ffn_dim": 48, "t2u_decoder_ffn_dim": 48,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
PERCEIVER = {
    **SIZES, **QUIET, "vocab_size": VOCABULARY, "num_latents": 6, "d_latents": 32, "d_model": 24, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 16, "v_channels": 32,
    "max_position_embeddings": 9,
}  # fmt: skip
LXMERT = {**TEXT, **QUIET, "l_layers": 1, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 7}
MGPSTR = {**SMALL, "image_size": [16, 16], "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0, "mlp_ratio": 2.0}
VITS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "flow_size": 16,
    "spectrogram_bins": 9, "use_stochastic_duration_prediction": False, "upsample_initial_channel": 16, "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "noise_scale": 0.0,
    "duration_predictor_filter_channels": 16, "posterior_encoder_num_wavenet_layers": 1, "initializer_range": 0.2,
}  # fmt: skip
GRANITE = {
    "input_dim": 10, "num_layers": 2, "hidden_dim": 32, "num_heads": 4, "dim_head": 8, "output_dim": 7, "context_size": 6,
    "max_pos_emb": 8, "initializer_range": 0.2,
}  # fmt: skip
GEMMA4 = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64, "pooling_kernel_size": 2,
    "use_clipped_linears": True,
}  # fmt: skip
FLORENCE = {
    "vision_config": {
        "embed_dim": [16, 32], "num_heads": [4, 4], "num_groups": [4, 4], "depths": [1, 2], "patch_size": [3, 3],
        "patch_stride": [4, 2], "patch_padding": [1, 1], "patch_prenorm": [False, True], "window_size": 3, "drop_path_rate": 0.0,
        "projection_dim": 32, "initializer_range": 0.2,
    },
    "text_config": {**BART, "model_type": "bart"}, "image_token_id": 60,
}  # fmt: skip
KOSMOS = {
    "vision_config": {
        **SIZES, "patch_embed_hidden_size": 24, "head_dim": 8, "max_num_patches": 8, "initializer_factor": 10.0,
    },
    "text_config": {
        "vocab_size": VOCABULARY, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "init_std": 0.2,
        "dropout": 0.0, "max_position_embeddings": 32,
    },
    "latent_query_num": 4,
}  # fmt: skip
DETR = {
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32, "encoder_layers": 2,
    "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_queries": 5, "dropout": 0.0, "init_std": 0.2, "num_labels": 5,
}  # fmt: skip
MODELS = {
    "ConditionalDetrForObjectDetection": Model(
        "ConditionalDetr",
        DETR,
        lambda: {"pixel_values": torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))},
        ("eager", "headprune"),
        "logits",
        alone=True,
    ),
    "Kosmos2_5ForConditionalGeneration": Model("Kosmos2_5", KOSMOS, read, ("eager", "headprune"), "logits", alone=True),
    "Florence2ForConditionalGeneration": Model("Florence2", FLORENCE, looked_at, EVERY, "logits", alone=True),
    "Gemma4VisionModel": Model("Gemma4Vision", GEMMA4, patches, alone=True),
    "VitsModel": Model("Vits", VITS, padded, ("eager",), "waveform"),
    "GraniteSpeechCTCEncoder": Model(
        "GraniteSpeechEncoder", GRANITE, lambda: {"hidden_states": frames()["input_features"]}, ("eager",), alone=True
    ),
    "ParakeetEncoder": Model(
        "ParakeetEncoder",
        {**SIZES, "num_key_value_heads": 4, "num_mel_bins": 10, "subsampling_conv_channels": 8, "subsampling_factor": 2},
        lambda: {"input_features": frames()["input_features"], "attention_mask": frames()["attention_mask"]},
    ),
    "PerceiverForMaskedLM": Model("Perceiver", PERCEIVER, padded, ("eager",), "logits"),
    "LxmertModel": Model("Lxmert", LXMERT, seen, ("eager",), "language_output"),
    "MgpstrModel": Model("Mgpstr", MGPSTR, picture, ("eager",)),
    "YolosModel": Model("Yolos", {**SMALL, "image_size": [16, 16], "num_detection_tokens": 3}, picture),
    "DPTModel": Model("DPT", {**SMALL, "is_hybrid": False, "backbone_out_indices": [0, 1, 1, 1]}, picture),
    "ViltModel": Model("Vilt", {**PICTURE, **TEXT, "patch_size": 8}, lambda: picture() | padded(), ("eager",)),
    "FlavaModel": Model("Flava", PARTS, lambda: picture() | padded(), ("eager",), "multimodal_embeddings"),
    "FastSpeech2ConformerModel": Model(
        "FastSpeech2Conformer", FASTSPEECH, lambda: {"input_ids": tokens()}, ("eager",), "spectrogram"
    ),
    "SeamlessM4TForSpeechToText": Model(
        "SeamlessM4T", {**SEAMLESS, "position_embeddings_type": "relative"}, frames, EVERY, "logits"
    ),
    "SeamlessM4Tv2ForSpeechToText": Model("SeamlessM4Tv2", SEAMLESS, frames, EVERY, "logits"),
}


def made(name: str, implementation: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{MODELS[name].config}Config")(**MODELS[name].options)
    config._attn_implementation = implementation
    return getattr(transformers, name)(config).eval()


def output(name: str, model) -> Tensor:
    torch.manual_seed(0)  # ViLT draws the order of its patches
    with torch.no_grad():
        return model(**MODELS[name].inputs())[MODELS[name].output]


@pytest.mark.parametrize(
    ("name", "implementation"), [(name, way) for name, model in MODELS.items() for way in model.implementations]
)
def test_cutting_equals_gating_and_survives_the_disk(name, implementation, tmp_path):
    model = made(name, implementation)
    sites = hp.attention_sites(model)
    keep = {site.name: [[0, 3], [1], [], [0, 1, 2]][index % 4] for index, site in enumerate(sites)}
    dense = output(name, model)
    with hp.gated(model, keep):
        expected = output(name, model)
    hp.cut(model, keep, run=(lambda model: output(name, model)) if MODELS[name].alone else None)
    assert (output(name, model) - expected).abs().max() <= 1e-5
    # FastSpeech tells how long each sound is.
    assert dense.shape != expected.shape or (dense - expected).abs().max() > 1e-2
    hp.save(model, tmp_path / "model")
    again = hp.load(tmp_path / "model", attn_implementation=implementation)
    assert torch.allclose(output(name, again), output(name, model), rtol=0, atol=1e-6)
    assert [site.head_map for site in hp.attention_sites(again)] == [site.head_map for site in hp.attention_sites(model)]
    layout = json.loads((tmp_path / "model" / "config.json").read_text())["headprune"]["layout"]
    built = made(name, implementation)  # as where headprune is not
    shrink(built, layout)
    built.load_state_dict(model.state_dict())
    assert torch.allclose(output(name, built), output(name, model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [ENCODERS["longformer"], VISION["timesformer"], VISION["data2vec_vision"]])
def test_attention_weights_are_those_of_the_heads_that_are_left(family):
    model, batch = family.make(), family.batch("right")
    sites = hp.attention_sites(model)
    hp.cut(model, {site.name: [] if index % 2 else [0, 1, 3] for index, site in enumerate(sites)})
    found = model(**batch, output_attentions=True)
    for weights in [*found.attentions, *(found.get("global_attentions") or ())]:
        assert weights.shape[1] in (0, 3)


def test_gate_gradients_of_windows_are_those_of_their_picture():
    model = made("Florence2ForConditionalGeneration", "sdpa")
    batch = {**looked_at(), "labels": tokens(3, 4)}
    del batch["decoder_input_ids"]
    rows = [{name: value[[row]] for name, value in batch.items()} for row in range(3)]
    together, alone = (hp.observe(model, batches, {"gate_gradient"}, loss_fn=losses) for batches in ([batch], rows))
    for site in together:
        assert torch.allclose(together[site].gate_gradient, alone[site].gate_gradient, rtol=1e-3, atol=1e-4)


def losses(model, batch) -> Tensor:
    logits = model(**batch).logits
    return torch.nn.functional.cross_entropy(logits.movedim(-1, 1), batch["labels"], reduction="none").mean(dim=1)
