"""The kinds of attention that the tests cut and compare with gating, family by family (tests/models, tests/surgery)."""

from __future__ import annotations

from headprune.models.site import AttentionSite

# Package -> names of module classes; a release may move a class between the modules of its package.
TESTED: dict[str, tuple[str, ...]] = {
    "headprune": ("VariableHeadAttention",),
    "timm": ("Attention", "WindowAttention"),
    "transformers": (
        "AfmoeAttention", "AlbertAttention", "Attention", "BartAttention", "BeitAttention", "BertAttention", "BigBirdAttention",
        "BigBirdPegasusDecoderAttention", "BigBirdPegasusEncoderAttention", "Blip2Attention", "Blip2QFormerAttention",
        "BlipAttention", "BlipTextAttention", "BloomAttention", "CLIPAttention", "CodeGenAttention", "CohereAttention",
        "ConvBertAttention", "CvtAttention", "Data2VecVisionAttention", "DbrxAttention", "DebertaAttention", "DebertaV2Attention",
        "DeepseekV2Attention", "DeepseekV3Attention", "DeiTAttention", "DistilBertSelfAttention", "DonutSwinAttention",
        "ElectraAttention", "Exaone4Attention", "Exaone4_5_VisionAttention", "FalconAttention", "GPT2Attention",
        "GPTBigCodeAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "Gemma2Attention", "Gemma3Attention",
        "Gemma3nTextAttention", "Gemma4TextAttention", "Glm4vTextAttention", "Glm4vVisionAttention", "GotOcr2VisionAttention",
        "GptOssAttention", "GraniteAttention", "HieraMaskUnitAttention", "IBertAttention", "InstructBlipAttention",
        "InstructBlipQFormerAttention", "InternVLVisionAttention", "JanusVisionAttention", "LEDDecoderAttention",
        "LEDEncoderAttention", "LagunaAttention", "LayoutLMv2Attention", "LayoutLMv3Attention", "LevitAttention",
        "LevitAttentionSubsample", "LlamaAttention", "LongT5Attention", "LongT5LocalAttention", "LongT5TransientGlobalAttention",
        "LongformerAttention", "MBartAttention", "MPNetSelfAttention", "MiMoV2FlashAttention", "MistralAttention",
        "MixtralAttention", "MobileViTAttention", "ModernBertAttention", "ModernBertDecoderAttention", "MoonshineAttention",
        "MoshiAttention", "MptAttention", "MultiHeadAttention", "OPTAttention", "Olmo2Attention", "PersimmonAttention",
        "Phi3Attention", "ProphetNetAttention", "ProphetNetNgramSelfAttention", "PvtV2SelfAttention", "Qwen2Attention",
        "Qwen2VLAttention", "Qwen2_5_VLAttention", "Qwen2_5_VLVisionAttention", "Qwen3Attention", "Qwen3MoeAttention",
        "Qwen3NextAttention", "Qwen3VLTextAttention", "Qwen3VLVisionAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention",
        "RobertaAttention", "Sam2Attention", "Sam2MultiScaleAttention", "SamAttention", "SamHQAttention", "SamHQVisionAttention",
        "SamHQVisionSdpaAttention", "SamVisionAttention", "SamVisionSdpaAttention", "SegGptAttention", "SmolLM3Attention",
        "StableLmAttention", "SwinAttention", "Swinv2Attention", "T5Attention", "TimeSformerAttention", "TrOCRAttention",
        "UMT5Attention", "ViTAttention", "VideoMAEAttention", "VisionAttention", "VitDetAttention", "Wav2Vec2BertSelfAttention",
        "Wav2Vec2ConformerSelfAttention", "WavLMAttention", "WhisperAttention", "XLNetRelativeAttention",
    ),
}  # fmt: skip


def is_tested(site: AttentionSite) -> bool:
    """Whether the site is of one of those classes; what is only built like them, a subclass too, is not."""
    kind = type(site.module)
    return kind.__name__ in TESTED.get(kind.__module__.partition(".")[0], ())
