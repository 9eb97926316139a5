"""A tiny random model of each decoder family: name -> builder. Weights large enough that every head matters."""

import torch
import transformers
from tiny_models import VOCABULARY
from transformers import PreTrainedModel

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}
# Eight positions are what generation with a window of four must go beyond.
MODERN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
LATENT = {
    **MODERN, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 9,
    "moe_intermediate_size": 16,
}  # fmt: skip
# The last layer's attention is linear and has no heads of ours.
HYBRID = {
    **MODERN, "num_hidden_layers": 3, "head_dim": 8, "layer_types": ["full_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
GEMMA4 = {
    **MODERN, "head_dim": 8, "global_head_dim": 16, "sliding_window": 4, "attention_k_eq_v": True, "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
GEMMA3N = {
    **MODERN, "head_dim": 8, "sliding_window": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4, "num_kv_shared_layers": 0, "layer_types": MIXED,
}  # fmt: skip
# The last two layers read the keys and values of the first two.
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED * 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}
MODERNBERT = {
    **OLD, "intermediate_size": 48, "max_position_embeddings": 64, "local_attention": 8, "initializer_cutoff_factor": 3.0,
    "layer_types": MIXED, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
MIMO = {
    **MODERN, "num_key_value_heads": 1, "head_dim": 12, "v_head_dim": 8, "sliding_window": 4, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 16,
}  # fmt: skip
DBRX = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **SPECIAL,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
}  # fmt: skip
FALCON = {**OLD, "bias": True}
# Family -> (what its classes are called before ForCausalLM and Config, configuration).
FAMILIES = {
    "gpt2": ("GPT2", GPT2),
    "openai_gpt": ("OpenAIGPT", GPT2),
    "ctrl": ("CTRL", {**GPT2, "dff": 48}),
    "opt": ("OPT", {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.2}),
    "gpt_neox": ("GPTNeoX", {**OLD, "intermediate_size": 48, "max_position_embeddings": 64}),
    "gpt_neox_japanese": ("GPTNeoXJapanese", {**OLD, "intermediate_multiple_size": 2, "max_position_embeddings": 64}),
    "persimmon": ("Persimmon", {**OLD, "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 4}),
    "codegen": ("CodeGen", {**GPT2, "rotary_dim": 4}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}),
    "falcon_mqa": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon_gqa": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("Falcon", {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False}),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "gpt_bigcode_mha": ("GPTBigCode", {**GPT2, "multi_query": False}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **SPECIAL}),
    "dbrx": ("Dbrx", DBRX),
    "llama": ("Llama", {**MODERN, "attention_bias": True}),
    "mistral": ("Mistral", {**MODERN, "sliding_window": 4}),
    "mixtral": ("Mixtral", {**MODERN, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": ("Qwen2", MODERN),
    "qwen3": ("Qwen3", {**MODERN, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**MODERN, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
    "qwen3_next": ("Qwen3Next", {**HYBRID, **EXPERTS}),
    "qwen3_5": ("Qwen3_5", HYBRID),
    "qwen3_5_moe": ("Qwen3_5Moe", {**HYBRID, **EXPERTS}),
    "afmoe": ("Afmoe", {**MODERN, "head_dim": 8, "sliding_window": 4, **EXPERTS, "num_dense_layers": 1, "layer_types": MIXED}),
    "laguna": ("Laguna", {**MODERN, "head_dim": 8, "sliding_window": 4, **EXPERTS, "layer_types": MIXED}),
    "mimo_v2": ("MiMoV2Flash", MIMO),
    # Eager: in some releases its sdpa leaves the soft cap out.
    "gemma2": (
        "Gemma2",
        {
            **MODERN,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": ("Gemma3", {**MODERN, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3n": ("Gemma3n", GEMMA3N),
    "gemma3n_shared": ("Gemma3n", {**GEMMA3N, **SHARED}),
    "gemma4": ("Gemma4", GEMMA4),
    "gemma4_shared": ("Gemma4", {**GEMMA4, **SHARED}),
    "moshi": ("Moshi", {**MODERN, "head_dim": 8, "ffn_dim": 48, "sliding_window": 64}),
    "phi3": ("Phi3", MODERN),
    "olmo2": ("Olmo2", MODERN),
    "granite": ("Granite", MODERN),
    "gpt_oss": ("GptOss", {**MODERN, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}),
    "smollm3": ("SmolLM3", {**MODERN, "no_rope_layers": [1, 0]}),
    "modernbert_decoder": ("ModernBertDecoder", MODERNBERT),
    "cohere": ("Cohere", {**MODERN, "use_qk_norm": True}),
    "stablelm": ("StableLm", {**MODERN, "qk_layernorm": True}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "q_lora_rank": 12}),
}
CLASSES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config"),
    "openai_gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig"),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig"),
    "gemma3n_shared": ("Gemma3nForCausalLM", "Gemma3nTextConfig"),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig"),
    "gemma4_shared": ("Gemma4ForCausalLM", "Gemma4TextConfig"),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig"),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig"),
}
try:
    transformers.Gemma3nForCausalLM  # noqa: B018  # of which transformers 5.17 wants timm, and timm torchvision
except ImportError:
    FAMILIES = {family: made for family, made in FAMILIES.items() if made[0] != "Gemma3n"}

SCALES_ADD_ONE = ("Gemma2", "Gemma3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe")  # norms that multiply by 1 + weight


def decoder(family: str, seed: int = 0, **options) -> PreTrainedModel:
    """A model of `family`, in eval mode without dropout, every parameter drawn anew (stock biases and sinks are all 0)."""
    prefix, settings = FAMILIES[family]
    model_class, config_class = CLASSES.get(family, (f"{prefix}ForCausalLM", f"{prefix}Config"))
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**settings, **options})
    for name in vars(config):
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    model = getattr(transformers, model_class)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "norm" in name.split(".")[-2]:
            scales = ("norm" in name or "ln_" in name) and "bias" not in name and prefix not in SCALES_ADD_ONE
            parameter.data.normal_(float(scales), 0.2)
    return model
