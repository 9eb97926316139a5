"""The kinds of attention that the tests cut and compare with gating, family by family (tests/models, tests/surgery)."""

from __future__ import annotations

from headprune.models.site import AttentionSite

# Package -> names of module classes; a release may move a class between the modules of its package.
TESTED: dict[str, tuple[str, ...]] = {
    "headprune": ("VariableHeadAttention",),
    "timm": ("Attention", "WindowAttention"),
    "transformers": (
        "AlbertAttention", "BartAttention", "BeitAttention", "BertAttention", "BloomAttention", "CLIPAttention",
        "CohereAttention", "Data2VecVisionAttention", "DebertaAttention", "DebertaV2Attention", "DeepseekV2Attention",
        "DeepseekV3Attention", "DeiTAttention", "DistilBertSelfAttention", "ElectraAttention", "FalconAttention",
        "GPT2Attention", "GPTNeoXAttention", "Gemma2Attention", "Gemma3Attention", "GptOssAttention", "GraniteAttention",
        "LEDDecoderAttention", "LEDEncoderAttention", "LlamaAttention", "LongformerAttention", "MBartAttention",
        "MistralAttention", "MixtralAttention", "MobileViTAttention", "ModernBertAttention", "MptAttention", "OPTAttention",
        "Olmo2Attention", "Phi3Attention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention", "RobertaAttention",
        "SmolLM3Attention", "StableLmAttention", "SwinAttention", "T5Attention", "TimeSformerAttention", "ViTAttention",
        "VideoMAEAttention", "Wav2Vec2BertSelfAttention", "Wav2Vec2ConformerSelfAttention", "WhisperAttention",
    ),
}  # fmt: skip


def is_tested(site: AttentionSite) -> bool:
    """Whether the site is of one of those classes; what is only built like them, a subclass too, is not."""
    kind = type(site.module)
    return kind.__name__ in TESTED.get(kind.__module__.partition(".")[0], ())
