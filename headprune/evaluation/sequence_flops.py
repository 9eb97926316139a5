"""FLOPs of one sequence through a model, from its modules alone: no weight is read and no number computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headprune.models import AttentionSite
from headprune.models.tiny_inputs import tiny_inputs
from headprune.models.tokens import decoder_of, encoder_of, is_inside

CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")  # what configs call the experts of a token


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sequence, and of its decoder in an encoder-decoder (elsewhere the same)."""

    tokens: int
    decoder: int


def sequence_flops(model: PreTrainedModel, sites: list[AttentionSite], lengths: Lengths, runs: Mapping[str, int]) -> int:
    """FLOPs (2 per multiply-add) of a forward pass of `model` over one sequence: all linear layers (of experts those that a token
    goes through), QK^T and PV of each query with all keys, or as many as its sliding window holds (no causal discount).

    Cross-attention has the decoder's queries and the encoder's keys; what stands behind both, as a head does, runs the decoder's
    tokens. runs: module name -> how often it runs in a pass, once where that is not said (`runs_of`).
    """
    encoder, decoder = encoder_of(model), decoder_of(model)
    crossing = {site.name for site in sites if site.kind == "cross" and is_inside(site.name, decoder)}
    sources = {id(part.module) for site in sites if site.name in crossing for part in site.projections if part.per_kv_head}

    def read_by(name: str, module: nn.Module | None = None) -> int:
        aside = decoder is None or id(module) in sources or is_inside(name, encoder)
        return lengths.tokens if aside else lengths.decoder

    emptied = [site.name for site in sites if not site.head_map.query_heads and not site.head_map.kv_heads]
    total = 0
    for name, module in model.named_modules():
        if any(is_inside(name, site) for site in emptied):  # what is left there (latents of DeepSeek) does not run
            continue
        total += 2 * active_weights(model, name, module) * read_by(name, module) * runs.get(name, 1)
    for site in sites:
        queries, keys = read_by(site.name), lengths.tokens if site.name in crossing else read_by(site.name)
        keys = min(keys, site.keys_in_window or keys)
        features = site.head_map.query_heads * (site.head_dim + site.value_dim)
        total += 2 * queries * keys * features * runs.get(site.name, 1)
    return total


def active_weights(model: PreTrainedModel, name: str, module: nn.Module) -> int:
    """Weights that one token is multiplied with in `module` itself: of a linear layer, and its share of the experts."""
    chosen, experts, total = chosen_experts(model.config), experts_of_linear(model, name, module), 0
    for kind, parameter in module._parameters.items():
        if parameter is None or kind.endswith("bias") or isinstance(module, nn.Embedding):
            continue
        if parameter.dim() == 3 and "expert" in name:
            total += parameter.numel() * chosen // parameter.shape[0]
        elif parameter.dim() == 2:
            total += parameter.numel() * chosen // experts if experts else parameter.numel()
    return total


def experts_of_linear(model: nn.Module, name: str, module: nn.Module) -> int | None:
    """How many experts share the tokens of a linear layer that is one's own (Switch) or holds all of them one below the other
    (DBRX); None elsewhere."""
    within: int | None = getattr(module, "moe_num_experts", None)
    above, found, _ = name.rpartition(".experts.")
    experts = model.get_submodule(f"{above}.experts") if found else None
    return len(experts) if isinstance(experts, nn.ModuleList | nn.ModuleDict) else within


def chosen_experts(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = (text, getattr(text, "ffn_config", None))
    counts = (getattr(place, name, None) for place in places for name in CHOSEN)
    count = next(filter(None, counts), 1)
    return round(sum(count) / len(count)) if isinstance(count, list) else count  # HunYuan's may be one for each layer


@torch.no_grad()
def runs_of(model: nn.Module) -> dict[str, int]:
    """Module name -> how often it runs in one pass, for those that run more than once: layers may share one (ALBERT, Perceiver).

    `model` is on the meta device, where nothing is computed. Some passes ask for values and end there; what runs only behind that
    counts once.
    """
    counts: dict[nn.Module, int] = {}

    def count(module: nn.Module, _args: Any) -> None:
        counts[module] = counts.get(module, 0) + 1

    hooks = [module.register_forward_pre_hook(count) for module in model.modules()]
    try:
        # A mask of padding is asked whether it hides anything.
        inputs = {name: value for name, value in (tiny_inputs(model) or {}).items() if name != "attention_mask"}
        model(**{name: value.to("meta") for name, value in inputs.items()})
    except Exception:  # whatever a model raises where there are no values
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return {name: counts[module] for name, module in model.named_modules() if counts.get(module, 0) > 1}
