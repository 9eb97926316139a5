"""gguf: one file for llama.cpp. Layers with counts of their own go into its architectures "deci" (Llama, Mistral, Qwen2) and
"openelm" (Qwen3 with tied embeddings); layers that are all alike into the family's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headprune.errors import UnsupportedModel, unknown_name
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.surgery.export.gguf_rope import write_rope
from headprune.surgery.export.gguf_vocabulary import write_vocabulary
from headprune.surgery.export.regularise import does_nothing, regularise
from headprune.surgery.export.same_output import same_output, small_output
from headprune.surgery.export.slots import Slots, cheapest
from headprune.surgery.export.target import refuse_other_weights, refuse_unknown, target

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Family:
    """own: the architecture for layers that are all alike; varied: the one for layers that differ.

    own_permutes: whether `own` rotates neighbouring features, as "deci" does (the weights are then reordered).
    """

    own: str
    own_permutes: bool
    varied: Callable[[PreTrainedModel], str]


def openelm_if_tied(model: PreTrainedModel) -> str:
    if not model.config.tie_word_embeddings:
        raise UnsupportedModel(
            "llama.cpp has no architecture for Qwen3 whose layers differ and whose embeddings are not tied. Export to stock "
            "(equal layers with dead heads), then to gguf, or plan with target='stock'."
        )
    return "openelm"


FAMILIES = {
    "llama": Family("llama", True, lambda model: "deci"),
    "mistral": Family("llama", True, lambda model: "deci"),
    "qwen2": Family("qwen2", False, lambda model: "deci"),
    "qwen3": Family("qwen3", False, openelm_if_tied),
}


@target("gguf", "llama.cpp and what is built on it", packages=("gguf",), suffix=".gguf")
def write_gguf(model: PreTrainedModel, path: Path, options: dict[str, Any]) -> list[str]:
    """options: dtype (f32, f16, bf16, q8_0), default as the model is; pre_tokenizer, llama.cpp's name of it, where it is not
    recognised."""
    from gguf import GGUFWriter

    refuse_unknown(options, ("dtype", "pre_tokenizer"))
    refuse_other_weights(model)
    dtype = options.get("dtype") or OF_DTYPE.get(model.dtype)
    if dtype not in TYPES:
        raise unknown_name("gguf dtype", dtype, TYPES)
    family = FAMILIES.get(model.config.model_type)
    if family is None or not model.can_generate():
        raise UnsupportedModel(
            f"gguf is written for {', '.join(FAMILIES)} language models, not {type(model).__name__}. Export to stock, and convert "
            "that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    if model.config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(
            f"the feed-forwards of this {type(model).__name__} use {model.config.hidden_act!r}; llama.cpp computes silu for such a "
            "model, whatever its config says."
        )
    expected = small_output(model)
    changed = regularise(model, layer_slots(model))
    notes = [str(changed), same_output(expected, small_output(model), "the even model")]
    head_maps = [site.head_map for site in attention_sites(model)]
    alike = len(set(head_maps)) == 1
    arch = family.own if alike else family.varied(model)
    writer = GGUFWriter(str(path), arch)
    write_sizes(writer, model, head_maps, alike)
    notes += write_rope(writer, model.config, head_dim_of(model))
    notes += write_vocabulary(writer, model, options)
    if getattr(model.config, "sliding_window", None):
        notes.append(f"llama.cpp attends to all tokens here: the same up to {model.config.sliding_window} tokens")
    permutes = arch == "deci" or (arch == family.own and family.own_permutes)
    for name, tensor in tensors(model, head_maps, permutes, arch == "openelm"):
        add_tensor(writer, name, tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [f"architecture {arch}, {dtype}", *notes]


def layer_slots(model: PreTrainedModel) -> dict[str, Slots]:
    """Even groups; an attention that does nothing stays so, except in layer 0, from which llama.cpp takes the size of a head."""
    sites, found = attention_sites(model), {}
    for index, site in enumerate(sites):
        costs = [site.parameters_per_head(per_kv_head) for per_kv_head in (False, True)]
        empty = index > 0 and does_nothing(site) and model.config.model_type != "qwen3"
        found[site.name] = Slots((), ()) if empty else cheapest(site.head_map, *costs)
    return found


def head_dim_of(model: PreTrainedModel) -> int:
    return attention_sites(model)[0].head_dim


def write_sizes(writer: GGUFWriter, model: PreTrainedModel, head_maps: list[HeadMap], alike: bool) -> None:
    config, head_dim = model.config, head_dim_of(model)
    query, kv = ([getattr(head_map, which) for head_map in head_maps] for which in ("query_heads", "kv_heads"))
    writer.add_name((config.name_or_path or "").rstrip("/").rpartition("/")[2] or config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size if alike else [config.intermediate_size] * len(head_maps))
    writer.add_head_count(query[0] if alike else query)
    writer.add_head_count_kv(kv[0] if alike else kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def tensors(model: PreTrainedModel, head_maps: list[HeadMap], permutes: bool, fused: bool) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of every weight. Raises UnsupportedModel for one that has no place there."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, (module, part) in {name: name.rsplit(".", 1) for name in state}.items():
        if module in MODEL:
            yield f"{MODEL[module]}.{part}", state[name]
            continue
        _, _, number, inner = module.split(".", 3)
        if inner not in LAYER:
            raise UnsupportedModel(f"{name} has no place in a gguf file of this architecture.")
        head_map = head_maps[int(number)]
        tensor, role = state[name], LAYER[inner]
        attention = role.startswith("attn_")
        if attention and not head_map.query_heads:
            continue  # an attention-free layer has no norm of it either
        if permutes and role in ("attn_q", "attn_k"):
            tensor = neighbours(tensor, head_map.query_heads if role == "attn_q" else head_map.kv_heads)
        if fused and role in ("attn_k", "attn_v"):
            continue
        if fused and role == "attn_q":
            role, parts = "attn_qkv", (state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv")
            tensor = torch.cat(list(parts))
        yield f"blk.{number}.{role}.{part}", tensor


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * head_dim, ...] so that the features that are rotated together (i and i + head_dim/2) become neighbours."""
    halves: Tensor = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, dtype: str) -> None:
    """Vectors stay fp32, as llama.cpp expects."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[TYPES[dtype] if tensor.dim() > 1 else "F32"]
    data = tensor.detach().cpu().float().contiguous().numpy()
    if kind.name == "Q8_0" and data.shape[-1] % 32:
        kind = GGMLQuantizationType.F16
    data = data.astype(np.float16) if kind.name == "F16" else data if kind.name == "F32" else quants.quantize(data, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
