"""nemotron-nas: a folder for the engines that have DeciLMForCausalLM of their own (vLLM, TensorRT-LLM, MLX, ExLlama).

Layers may differ in key/value heads or have no attention at all; where there is one it has as many query heads as all others, so
that dead ones fill up the layers that lost more. Whole groups that went save cache, whole attentions save everything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.models.site import AttentionSite
from headprune.surgery.export import configuration_nemotron_nas
from headprune.surgery.export.regularise import does_nothing, regularise
from headprune.surgery.export.same_output import same_output, small_output
from headprune.surgery.export.slots import Slots, in_groups, kv_heads_needed
from headprune.surgery.export.stock import original_config
from headprune.surgery.export.target import refuse_other_weights, refuse_unknown, target

CONFIG_CODE = Path(configuration_nemotron_nas.__file__)
# Family -> the biases that its projections have, as this architecture says it.
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"attention_bias": False, "qkv_bias": True}}
NO_WINDOW = {
    "window_length": None, "num_sink_tokens": None, "unshifted_sink": False, "use_prefill_window_in_sink_attention": False,
}  # fmt: skip
FFN_STEP = 256  # engines round the width that `ffn_mult` gives up to a multiple of it


@target("nemotron-nas", "engines with DeciLMForCausalLM: vLLM, TensorRT-LLM, MLX, ExLlama")
def write_nemotron_nas(model: PreTrainedModel, folder: Path, options: dict[str, Any]) -> list[str]:
    refuse_unknown(options)
    refuse_other_weights(model)
    original = original_config(model.config)
    refuse_other_families(model, original)
    expected = small_output(model)
    changed = regularise(model, common_query_heads(attention_sites(model), original))
    check = same_output(expected, small_output(model), "the even model")
    head_maps = [site.head_map for site in attention_sites(model)]
    # Not the pruned model's own, which adds its code.
    PreTrainedModel.save_pretrained(model, folder, state_dict=without_empty_attentions(model.state_dict(), head_maps))
    config = nas_config(original, head_maps, attention_sites(model)[0].head_dim)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(CONFIG_CODE, folder / CONFIG_CODE.name)
    counts = ", ".join("none" if not found.query_heads else str(found.kv_heads) for found in head_maps)
    return [f"{config['num_attention_heads']} query heads in each layer, key/value heads: {counts}", str(changed), check]


def refuse_other_families(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    if config.model_type not in FAMILIES or not model.can_generate():
        raise UnsupportedModel(
            f"nemotron-nas holds {', '.join(FAMILIES)} language models, not {type(model).__name__}. Export to vllm, which takes "
            "any that dispatches its attention, or to stock."
        )
    if getattr(config, "sliding_window", None):
        raise UnsupportedModel(f"nemotron-nas has no sliding window, and this model has one of {config.sliding_window} tokens.")


def common_query_heads(sites: list[AttentionSite], config: PreTrainedConfig) -> Mapping[str, Slots]:
    """The same number of query heads for all attentions that have any, at the fewest parameters, then the smallest cache.

    Layer 0 always has an attention: engines start their residual there.
    """
    least, most = max(site.head_map.query_heads for site in sites), config.num_attention_heads
    counts = [count for count in range(least, most + 1) if config.hidden_size % count == 0 or count == most]
    choices = [{site.name: slots_with(site, count, first=site is sites[0]) for site in sites} for count in counts]
    return min(choices, key=lambda slots: cost(sites, slots))


def cost(sites: list[AttentionSite], slots: Mapping[str, Slots]) -> tuple[int, int]:
    """(parameters, key/value heads)."""
    kinds = ((False, "query"), (True, "kv"))
    return (
        sum(len(getattr(slots[site.name], kind)) * site.parameters_per_head(shared) for site in sites for shared, kind in kinds),
        sum(len(found.kv) for found in slots.values()),
    )


def slots_with(site: AttentionSite, query_heads: int, *, first: bool) -> Slots:
    """The heads of `site` among `query_heads`, on the fewest key/value heads that hold them."""
    if not site.head_map.query_heads:
        return Slots((), ()) if does_nothing(site) and not first else Slots((None,) * query_heads, (None,))
    divisors = (kv for kv in range(1, query_heads + 1) if query_heads % kv == 0)
    kv_heads = next(kv for kv in divisors if kv_heads_needed(site.head_map, query_heads // kv) <= kv)
    return in_groups(site.head_map, query_heads // kv_heads, kv_heads)


def without_empty_attentions(state: Mapping[str, Tensor], head_maps: list[HeadMap]) -> dict[str, Tensor]:
    """A layer without heads has neither projections nor the norm before them."""
    empty = [layer for layer, head_map in enumerate(head_maps) if not head_map.query_heads]
    gone = tuple(f"model.layers.{layer}.{part}." for layer in empty for part in ("self_attn", "input_layernorm"))
    return {name: value for name, value in state.items() if not name.startswith(gone)}


def nas_config(original: PreTrainedConfig, head_maps: list[HeadMap], head_dim: int) -> dict[str, Any]:
    """config.json: Llama's keys, and a block for each layer in place of counts for all."""
    known = set(LlamaConfig().to_dict()) - {"architectures", "model_type", "transformers_version", "per_layer_config"}
    config = {key: value for key, value in original.to_dict().items() if key in known} | FAMILIES[original.model_type]
    rope = dict(original.rope_parameters)
    return {
        **config,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIG_CODE.stem}.DeciLMConfig"},
        "num_attention_heads": max(head_map.query_heads for head_map in head_maps),
        "num_key_value_heads": None,
        "head_dim": head_dim,
        # As engines of before transformers 5 read it.
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "block_configs": [{"attention": attention(head_map), "ffn": feed_forward(original)} for head_map in head_maps],
    }


def attention(head_map: HeadMap) -> dict[str, Any]:
    group = head_map.group_sizes[0] if head_map.query_heads else None
    return {"n_heads_in_group": group, "no_op": group is None, "replace_with_linear": False, "sparsify": None, **NO_WINDOW}


def feed_forward(config: PreTrainedConfig) -> dict[str, Any]:
    """Its width as a multiple of 2/3 of the hidden size, which every engine knows; where that would round it, as it is."""
    width = config.intermediate_size
    said = {"intermediate_size": width} if width % FFN_STEP else {"ffn_mult": 1.5 * width / config.hidden_size}
    return {**said, "no_op": False, "replace_with_linear": False, "sparsify": None}
