"""Small models for the comparison, pruned in the ways that an export must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from engines.trained import trained
from transformers import PreTrainedModel

import headprune as hp

SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "initializer_range": 0.08,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Layer -> query heads that stay, of 8 in 4 groups.
RAGGED = {0: [0, 1, 2, 5], 1: [0, 3, 6], 2: [], 3: [2, 3, 6, 7]}
WITH_HEADS = {**RAGGED, 2: [7]}
ALIKE = {layer: [0, 1, 4, 5] for layer in range(4)}
GROUPS = {0: [0, 1, 4, 5], 1: [], 2: [2, 3, 6, 7], 3: [6, 7]}
UNPRUNED: dict[int, list[int]] = {}


def pruned(family: str, keep: Mapping[int, Sequence[int]], **options) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the dense model, a pruned copy); vectors drawn too, so that biases and norms matter."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "tie_word_embeddings": False, **options})
    dense, smaller = (seeded(family, config) for _ in range(2))
    if keep:
        hp.cut(smaller, {f"model.layers.{layer}.self_attn": heads for layer, heads in keep.items()})
    return dense, smaller


def seeded(family: str, config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.normal_(float("norm" in name), 0.2)
    return model


@dataclass(frozen=True)
class Case:
    """build gives (dense, pruned) or (dense, pruned, tokenizer); architecture: what the engine must take the export for.

    usual: in the engine's usual precision of cache and attention in place of fp32.
    """

    name: str
    build: Callable[[], tuple]
    architecture: str
    target: str = "gguf"
    options: Mapping[str, str] = field(default_factory=lambda: {"dtype": "f32"})
    usual: bool = False

    @property
    def precision(self) -> str:
        return f"{self.options.get('dtype', 'f32')}{', usual' if self.usual else ''}"


LLAMA_CPP = [
    Case("llama, ragged, a layer without heads", lambda: pruned("Llama", RAGGED), "deci"),
    Case("llama, ragged, no heads in layer 0", lambda: pruned("Llama", {**RAGGED, 0: []}), "deci"),
    Case(
        "llama, ragged, tied, llama3 rope",
        lambda: pruned("Llama", WITH_HEADS, tie_word_embeddings=True, rope_parameters=LLAMA3),
        "deci",
    ),
    Case("llama, ragged, all biases", lambda: pruned("Llama", RAGGED, attention_bias=True), "deci"),
    Case("mistral, ragged", lambda: pruned("Mistral", WITH_HEADS, sliding_window=None), "deci"),
    Case("qwen2, ragged, biases of q, k and v", lambda: pruned("Qwen2", WITH_HEADS), "deci"),
    Case("qwen3, ragged, tied", lambda: pruned("Qwen3", RAGGED, tie_word_embeddings=True), "openelm"),
    Case("llama, all layers alike", lambda: pruned("Llama", ALIKE), "llama"),
    Case("qwen2, all layers alike", lambda: pruned("Qwen2", ALIKE), "qwen2"),
    Case("qwen3, all layers alike", lambda: pruned("Qwen3", ALIKE), "qwen3"),
    Case("llama, not pruned", lambda: pruned("Llama", UNPRUNED), "llama"),
    *(
        Case("llama, trained, ragged, with tokenizer", trained, "deci", options={"dtype": dtype})
        for dtype in ("f32", "f16", "bf16", "q8_0")
    ),
    Case("llama, trained, ragged, with tokenizer", trained, "deci", usual=True),
    Case("llama, ragged, a layer without heads", lambda: pruned("Llama", RAGGED), "deci", usual=True),
]


def in_vllm(name: str, target: str, *arguments, **options) -> Case:
    architecture = {"vllm": "TransformersForCausalLM", "nemotron-nas": "DeciLMForCausalLM"}[target]
    return Case(name, lambda: pruned(*arguments, **options), architecture, target, {})


VLLM = [
    in_vllm("llama, ragged, a layer without heads", "vllm", "Llama", RAGGED),
    in_vllm("qwen2, ragged, biases of q, k and v", "vllm", "Qwen2", WITH_HEADS),
    in_vllm("qwen3, ragged, tied", "vllm", "Qwen3", WITH_HEADS, tie_word_embeddings=True),
    in_vllm("llama, groups and an attention gone", "nemotron-nas", "Llama", GROUPS),
    in_vllm("llama, ragged, all biases, llama3 rope", "nemotron-nas", "Llama", RAGGED, attention_bias=True, rope_parameters=LLAMA3),
    in_vllm("qwen2, ragged, tied", "nemotron-nas", "Qwen2", WITH_HEADS, tie_word_embeddings=True),
]
