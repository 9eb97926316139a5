"""Tiny random encoders, encoder-decoders and vision models: what each family needs for the tests that all of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import page_backbone  # noqa: F401  # LayoutLMv2 can be made
import torch
import transformers
from tiny_models import VOCABULARY, padded, tokens
from torch import Tensor

EVERY = ("eager", "sdpa", "headprune")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 32, "num_labels": 5}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = 5


def one_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[[row]] for name, value in batch.items()}


@dataclass(frozen=True)
class Family:
    """A tiny model: its class and config, a batch for it (padded on a side), and the attentions that it can run. one: a
    sample of a batch."""

    model: str
    config: str
    options: dict
    batch: Callable[[str], dict[str, Tensor]]
    implementations: tuple[str, ...] = EVERY
    one: Callable[[dict[str, Tensor], int], dict[str, Tensor]] = one_row

    def make(self, implementation: str | None = None, seed: int = 0) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**copy.deepcopy(self.options))  # some configs take theirs apart
        config._attn_implementation = implementation or self.implementations[0]
        return trained(getattr(transformers, self.model)(config)).eval()


def trained(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """What starts as zeros (queries of a Q-Former, tables of relative positions, DeBERTa's biases) does not stay so, nor does what
    is the same for all features of a batch norm."""
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)):
        torch.nn.init.normal_(norm.running_mean, std=0.1)
        for spread in (norm.weight, norm.running_var, norm.bias):
            torch.nn.init.uniform_(spread, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if not parameter.any() and (parameter.dim() > 1 or name.endswith(("q_bias", "v_bias"))):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def text_batch(side: str) -> dict[str, Tensor]:
    batch = padded(side=side)
    labels = torch.randint(0, LABELS, batch["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    return {**batch, "labels": labels.where(batch["attention_mask"].bool(), -100)}


def encoder(name: str, implementations: tuple[str, ...] = EVERY, **options) -> Family:
    return Family(f"{name}ForTokenClassification", f"{name}Config", {**TEXT, **options}, text_batch, implementations)


ENCODERS = {
    "bert": encoder("Bert", **QUIET),
    "roberta": encoder("Roberta", **QUIET),
    "mpnet": encoder("MPNet", ("eager",), relative_attention_num_buckets=32, bos_token_id=1, eos_token_id=2, **QUIET),
    "electra": encoder("Electra", embedding_size=16, **QUIET),
    "albert": encoder(
        "Albert", embedding_size=16, num_hidden_groups=2, classifier_dropout_prob=0.0, num_hidden_layers=4, **QUIET
    ),
    "convbert": encoder("ConvBert", ("eager",), num_attention_heads=8, embedding_size=16, conv_kernel_size=3, **QUIET),
    "ibert": encoder("IBert", ("eager",), **QUIET),
    "distilbert": Family(
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        {
            "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY, "initializer_range": 0.2,
            "dropout": 0.0, "attention_dropout": 0.0, "num_labels": LABELS, "max_position_embeddings": 32,
        },
        text_batch,
    ),
    "modernbert": encoder(
        "ModernBert", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=4,
        layer_types=["full_attention", "sliding_attention"], initializer_cutoff_factor=3.0, embedding_dropout=0.0,
    ),
    "deberta": encoder(
        "Deberta", ("eager",), relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8,
        type_vocab_size=0, position_biased_input=False, **QUIET,
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


def sound_batch(side: str) -> dict[str, Tensor]:
    values = torch.randn(3, 420, generator=torch.Generator().manual_seed(4 if side == "left" else 5))
    mask = torch.ones(3, 420, dtype=torch.long)
    mask[1, 300:] = 0
    return {"input_values": values * mask, "attention_mask": mask, "labels": torch.arange(3) % LABELS}


def frames_batch(side: str) -> dict[str, Tensor]:
    """A spectrogram [batch, frames, bins]."""
    batch = sound_batch(side)
    values, mask = batch["input_values"].view(3, 42, 10), batch["attention_mask"][:, ::10]
    return {"input_features": values, "attention_mask": mask, "labels": batch["labels"]}


def listener(name: str, batch: Callable[[str], dict[str, Tensor]], implementations: tuple[str, ...] = EVERY, **options) -> Family:
    options = {**SIZES, **LISTENER, "num_labels": LABELS, **options}
    return Family(f"{name}ForSequenceClassification", f"{name}Config", options, batch, implementations)


LISTENER = {
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "conformer_conv_dropout": 0.0,
    "conv_depthwise_kernel_size": 3, "classifier_proj_size": 16, "feature_projection_input_dim": 10,
    "left_max_position_embeddings": 4, "right_max_position_embeddings": 2,
}  # fmt: skip
ENCODERS |= {
    "wav2vec2_conformer": listener("Wav2Vec2Conformer", sound_batch, position_embeddings_type="relative"),
    "wav2vec2_conformer_rotary": listener("Wav2Vec2Conformer", sound_batch, position_embeddings_type="rotary"),
    "wavlm": listener("WavLM", sound_batch, ("eager",), num_buckets=8, max_bucket_distance=16),
    "wavlm_large": listener("WavLM", sound_batch, ("eager",), num_buckets=8, max_bucket_distance=16, do_stable_layer_norm=True),
    "wav2vec2_bert": listener("Wav2Vec2Bert", frames_batch, position_embeddings_type="relative_key"),
}


def longformer_batch(side: str) -> dict[str, Tensor]:
    """As long as whole windows; the first token sees all others and is seen by them."""
    batch = padded(length=12, side=side)
    labels = torch.randint(0, LABELS, batch["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    seeing = torch.zeros_like(labels)
    seeing[:, 0] = 1
    return {**batch, "labels": labels.where(batch["attention_mask"].bool(), -100), "global_attention_mask": seeing}


ENCODERS["longformer"] = Family(
    "LongformerForTokenClassification", "LongformerConfig", {**TEXT, **QUIET, "attention_window": [4, 4]}, longformer_batch,
    ("eager",),
)  # fmt: skip


def page_batch(side: str) -> dict[str, Tensor]:
    """Words and where they stand on a page."""
    batch, generator = text_batch(side), torch.Generator().manual_seed(4 if side == "left" else 5)
    corner = torch.randint(0, 40, (*batch["input_ids"].shape, 2), generator=generator)
    return {**batch, "bbox": torch.cat([corner, corner + torch.randint(1, 20, corner.shape, generator=generator)], dim=-1)}


def seen_page_batch(side: str) -> dict[str, Tensor]:
    """And a picture of the page."""
    generator = torch.Generator().manual_seed(6)
    return {**page_batch(side), "pixel_values": torch.rand(3, 3, 16, 16, generator=generator)}


def page_with_image_batch(side: str) -> dict[str, Tensor]:
    batch = seen_page_batch(side)
    return {**batch, "image": batch.pop("pixel_values")}


PAGE = {
    "coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 64, "rel_pos_bins": 8, "max_rel_pos": 8,
    "rel_2d_pos_bins": 16, "max_rel_2d_pos": 32, "bos_token_id": 1, "eos_token_id": 2, **QUIET,
}  # fmt: skip
PAGE_V2 = {**PAGE, "coordinate_size": 5, "shape_size": 6, "image_feature_pool_shape": [2, 2, 8], "max_2d_position_embeddings": 1024}


def page_reader(version: str, batch: Callable[[str], dict[str, Tensor]], **options) -> Family:
    name, options = f"LayoutLM{version}", {**TEXT, **options}
    return Family(f"{name}ForTokenClassification", f"{name}Config", options, batch, ("eager",))


ENCODERS |= {
    "layoutlmv2": page_reader("v2", page_with_image_batch, fast_qkv=True, **PAGE_V2),
    "layoutlmv2_separate": page_reader("v2", page_with_image_batch, fast_qkv=False, **PAGE_V2),
    "layoutlmv3": page_reader("v3", page_batch, **PAGE),
    "layoutlmv3_seen": page_reader("v3", seen_page_batch, **PAGE, input_size=16, patch_size=8),
}


def blocks_batch(side: str) -> dict[str, Tensor]:
    """Longer than all that its sparse attention looks at."""
    batch = padded(length=18, side=side)
    labels = torch.randint(0, LABELS, batch["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    return {**batch, "labels": labels.where(batch["attention_mask"].bool(), -100)}


BLOCKS = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
ENCODERS["big_bird"] = Family(
    "BigBirdForTokenClassification", "BigBirdConfig", {**TEXT, **QUIET, **BLOCKS}, blocks_batch, ("eager",)
)  # fmt: skip

ENCODERS["xlnet"] = Family(
    "XLNetForTokenClassification",
    "XLNetConfig",
    {
        "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": VOCABULARY, "initializer_range": 0.2,
        "dropout": 0.0, "num_labels": LABELS,
    },
    text_batch,
    ("eager",),
)  # fmt: skip


def target_batch(side: str) -> dict[str, Tensor]:
    """Encoder tokens with padding, and labels of another length whose last positions do not count."""
    labels = tokens(3, 6, seed=3)
    labels[1, 4:] = -100
    return {**padded(side=side), "labels": labels}


def written_batch(side: str) -> dict[str, Tensor]:
    """Pictures of writing, and what it says."""
    return {"pixel_values": picture_batch(side)["pixel_values"], "labels": target_batch(side)["labels"]}


def given_target_batch(side: str) -> dict[str, Tensor]:
    """For a model that does not shift its labels."""
    batch = target_batch(side)
    return {**batch, "decoder_input_ids": batch["labels"].clamp(min=1).roll(1, dims=1)}


def long_target_batch(side: str) -> dict[str, Tensor]:
    return {**target_batch(side), **padded(length=12, side=side)}


def blocks_target_batch(side: str) -> dict[str, Tensor]:
    return {**target_batch(side), **padded(length=18, side=side)}


def spoken_batch(side: str) -> dict[str, Tensor]:
    """As many samples as make some frames; the mask says which are sound."""
    values = torch.randn(3, 2400, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(3, 2400, dtype=torch.long)
    mask[1, 1600:] = 0
    return {"input_values": values * mask, "attention_mask": mask, "labels": target_batch(side)["labels"]}


def spectrogram_batch(side: str) -> dict[str, Tensor]:
    """The mask says which frames are sound; Whisper's encoder has half as many positions and looks at all of them."""
    features = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = 0
    return {"input_features": features * mask[:, None], "attention_mask": mask, "labels": target_batch(side)["labels"]}


BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "init_std": 0.2, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": VOCABULARY,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
LONG_T5 = {**T5, "encoder_attention_type": "transient-global", "local_radius": 2, "global_block_size": 2}
FSMT = {**BART, "langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "begin_suppress_tokens": None}
MOONSHINE = {
    "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY, "initializer_range": 0.2, "attention_bias": True,
    "decoder_start_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32,
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    }.items()},
}  # fmt: skip
PROPHETNET = {
    "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "init_std": 0.2,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "max_position_embeddings": 32, "num_buckets": 4, "relative_max_distance": 8, "ngram": 2,
}  # fmt: skip
# GPT-2 behind an encoder has cross attention.
BERT_GPT2 = {
    "encoder": {"model_type": "bert", **TEXT, **QUIET},
    "decoder": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY,
        "initializer_range": 0.2, "add_cross_attention": True, "is_decoder": True, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
VIT_TROCR = {
    "encoder": {"model_type": "vit", **SIZES, **QUIET, "image_size": 16, "patch_size": 4},
    "decoder": {
        "model_type": "trocr", "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "vocab_size": VOCABULARY, "max_position_embeddings": 32, "init_std": 0.2, "dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "is_decoder": True, "add_cross_attention": True, "cross_attention_hidden_size": 32,
    },
    "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
LED = {**BART, "attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
SEQ2SEQ = {
    "bigbird_pegasus": Family(
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        {**BART, **QUIET, **BLOCKS},
        blocks_target_batch,
        ("eager",),
    ),
    "led": Family("LEDForConditionalGeneration", "LEDConfig", LED, long_target_batch, ("eager",)),
    "bert_gpt2": Family("EncoderDecoderModel", "EncoderDecoderConfig", BERT_GPT2, target_batch),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, target_batch),
    "fsmt": Family("FSMTForConditionalGeneration", "FSMTConfig", FSMT, given_target_batch, ("eager",)),
    "longt5": Family("LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 2}, target_batch, ("eager",)),
    "longt5_global": Family("LongT5ForConditionalGeneration", "LongT5Config", LONG_T5, target_batch, ("eager",)),
    "mbart": Family("MBartForConditionalGeneration", "MBartConfig", BART, target_batch),
    "moonshine": Family("MoonshineForConditionalGeneration", "MoonshineConfig", MOONSHINE, spoken_batch),
    "prophetnet": Family("ProphetNetForConditionalGeneration", "ProphetNetConfig", PROPHETNET, target_batch, ("eager",)),
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, target_batch),
    "trocr": Family("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", VIT_TROCR, written_batch, ("eager",)),
    "umt5": Family("UMT5ForConditionalGeneration", "UMT5Config", T5, target_batch),
    "whisper": Family("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, spectrogram_batch),
}


def picture_batch(side: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5 if side == "left" else 6)
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator), "labels": torch.arange(3) % LABELS}


def large_picture_batch(side: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5 if side == "left" else 6)
    return {**picture_batch(side), "pixel_values": torch.randn(3, 3, 64, 64, generator=generator)}


def caption_batch(side: str) -> dict[str, Tensor]:
    """Pictures and captions, the captions padded."""
    return {"pixel_values": picture_batch(side)["pixel_values"], **padded(side=side), "return_loss": True}


def film_batch(side: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5 if side == "left" else 6)
    return {"pixel_values": torch.randn(3, 4, 3, 16, 16, generator=generator), "labels": torch.arange(3) % LABELS}


def classifier(name: str, implementations: tuple[str, ...] = EVERY, **options) -> Family:
    model, config = f"{name}ForImageClassification", f"{name}Config"
    return Family(model, config, {**PICTURE, **options}, picture_batch, implementations)


PICTURE = {**QUIET, "image_size": 16, "patch_size": 4, "num_labels": LABELS, "initializer_range": 0.2}
CLIP = {
    "text_config": {**TEXT, "eos_token_id": 2, "attention_dropout": 0.0},
    "vision_config": {**SIZES, "image_size": 16, "patch_size": 4},
    "projection_dim": 16, "initializer_factor": 4.0,
}  # fmt: skip
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [4, 4], "window_size": 4, "patch_size": 2, "drop_path_rate": 0.0}
HIERA = {
    "embed_dim": 32, "depths": [1, 1], "num_heads": [4, 4], "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2],
    "patch_padding": [1, 1], "masked_unit_size": [4, 4], "masked_unit_attention": [True, False], "num_query_pool": 1,
    "query_stride": [2, 2], "drop_path_rate": 0.0,
}  # fmt: skip
CVT = {
    "patch_sizes": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "embed_dim": [16, 32], "num_heads": [4, 4],
    "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0],
    "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True], "kernel_qkv": [3, 3],
    "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1],
    "qkv_projection_method": ["dw_bn", "dw_bn"],
}  # fmt: skip
PVT = {
    "num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [4, 4], "mlp_ratios": [2, 2], "drop_path_rate": 0.0,
}  # fmt: skip
FILM = {**PICTURE, **SIZES, "patch_size": 8, "num_frames": 4}
BIASED = {**SIZES, "use_relative_position_bias": True, "drop_path_rate": 0.0, "layer_scale_init_value": 1.0}
VISION = {
    "beit": classifier("Beit", use_shared_relative_position_bias=True, **BIASED),
    "data2vec_vision": classifier("Data2VecVision", ("eager", "sdpa"), use_shared_relative_position_bias=True, **BIASED),
    "mobilevit": classifier(
        "MobileViT",
        ("eager",),
        image_size=32,
        patch_size=2,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        classifier_dropout_prob=0.0,
        initializer_range=0.5,
    ),
    "pvt_v2": classifier("PvtV2", ("eager",), **PVT),
    "levit": Family(
        "LevitForImageClassification",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 32, 64],
            "num_attention_heads": [4, 4, 4],
            "key_dim": [8, 8, 8],
            "depths": [2, 1, 1],
            "attention_ratio": [2, 1, 3],
            "num_labels": LABELS,
            "initializer_range": 0.1,
        },
        large_picture_batch,
        ("eager",),
    ),
    "pvt_v2_linear": classifier("PvtV2", ("eager",), linear_attention=True, **PVT),
    "cvt": classifier("Cvt", ("eager",), **CVT),
    "timesformer": Family("TimesformerForVideoClassification", "TimesformerConfig", FILM, film_batch, ("eager",)),
    "videomae": Family("VideoMAEForVideoClassification", "VideoMAEConfig", {**FILM, "tubelet_size": 2}, film_batch),
    "vit": classifier("ViT", **SIZES),
    "deit": classifier("DeiT", layer_norm_eps=1e-3, **SIZES),
    "swin": classifier("Swin", **SWIN),
    "swin_v2": classifier("Swinv2", ("eager",), **SWIN),
    "donut": classifier("DonutSwin", ("eager",), **SWIN),
    "hiera": Family("HieraForImageClassification", "HieraConfig", {**PICTURE, **HIERA}, picture_batch, ("eager",)),
    "clip": Family("CLIPModel", "CLIPConfig", CLIP, caption_batch),
}
