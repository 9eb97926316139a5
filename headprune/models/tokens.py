"""Which tokens of a batch count, at each attention: padded ones belong to no statistic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput

TokenMask = Callable[[Any], Tensor | None]
SiteTokenMask = Callable[[str, Any], Tensor | None]
IGNORED_LABEL = -100


def token_masks(model: nn.Module, token_mask: TokenMask | None = None, *, logits: bool = False) -> SiteTokenMask:
    """(site name, batch) -> bool or 0/1 [batch, tokens] of the tokens that count at that attention of `model`; None: all do.

    token_mask(batch) counts for all attentions. By default it is the batch's 2-D "attention_mask"; in the decoder of an
    encoder-decoder its "decoder_attention_mask", else the positions that have a label; in a Q-Former that of its own text behind
    its queries; in a part of the model that reads pictures or sound there is none; behind the words of a page the places of its
    picture count too. In a model of torch's own encoders and decoders
    it is what "src_key_padding_mask" or "tgt_key_padding_mask" leave, named as their forwards name them. logits: of those of the
    model, which are of words alone, of one stream.
    """
    if token_mask is not None:
        return lambda site, batch: token_mask(batch)
    decoder = decoder_of(model)

    def mask(site: str, batch: Any) -> Tensor | None:
        if not isinstance(batch, Mapping):
            return None
        around = model_around(model, site)
        if "query_embeds" in inputs_of(around):
            return None if site.endswith("crossattention") else query_mask(model, around, batch)
        if not reads_tokens(around):
            return None
        if around is None and "attention_mask" not in batch:
            return unpadded(model, site, batch)
        if is_inside(site, decoder):
            words = plane(batch, "decoder_attention_mask", target_mask(batch))
        else:
            words = plane(batch, "attention_mask")
        return words if logits else in_streams(around, before_picture(around, batch, words))

    return mask


def unpadded(model: nn.Module, site: str, batch: Mapping[str, Any]) -> Tensor | None:
    """What torch's padding masks (True, or -inf, where there is padding) leave of the tokens that run through `site`."""
    parents = [model.get_submodule(site[:end]) for end, letter in enumerate(site) if letter == "."]
    decodes = any(isinstance(parent, nn.TransformerDecoderLayer) for parent in (model, *parents))
    padding = plane(batch, f"{'tgt' if decodes else 'src'}_key_padding_mask")
    if padding is None:
        return None
    return ~padding if padding.dtype == torch.bool else padding != float("-inf")


def decoder_of(model: nn.Module) -> str | None:
    """The path of the decoder in an encoder-decoder; None in every other model."""
    decoder_in = getattr(model, "get_decoder", None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or decoder_in is None:
        return None
    decoder = decoder_in()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def encoder_of(model: nn.Module) -> str | None:
    """The path of the encoder in an encoder-decoder; None in every other model."""
    encoder_in = getattr(model, "get_encoder", None)
    if decoder_of(model) is None or encoder_in is None:
        return None
    encoder = encoder_in()
    return next((name for name, module in model.named_modules() if module is encoder and name), None)


def is_inside(name: str, path: str | None) -> bool:
    """Whether the module at `name` is the one at `path` or in it."""
    return path is not None and f"{name}.".startswith(f"{path}.")


def model_around(model: nn.Module, site: str) -> nn.Module | None:
    """The innermost transformers model around the attention `site`."""
    path = site
    while path:
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        if hasattr(around, "main_input_name"):
            return around
    return None


def inputs_of(around: nn.Module | None) -> Set[str]:
    return set() if around is None else inspect.signature(around.forward).parameters.keys()


def reads_tokens(around: nn.Module | None) -> bool:
    """Whether the transformers model `around` an attention reads tokens, not pictures or sound. Not all towers name their input."""
    if around is None or around.main_input_name != "input_ids":
        return around is None
    return "input_ids" in (inputs := inputs_of(around)) or inputs.isdisjoint({"pixel_values", "grid_thw"})


def query_mask(model: nn.Module, around: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Of a Q-Former, which reads learned queries and behind them, in InstructBLIP and in BLIP-2 for retrieval, text."""
    own_text = "input_ids" in inputs_of(around)
    if not own_text and not getattr(around.config, "use_qformer_text_input", False):
        return None
    text = plane(batch, "qformer_attention_mask" if own_text else "attention_mask")
    queries: Any = getattr(getattr(model, "config", None), "num_query_tokens", None)
    return text if text is None or queries is None else torch.cat([text.new_ones(len(text), queries), text], dim=1)


def in_streams(around: nn.Module | None, mask: Tensor | None) -> Tensor | None:
    """ProphetNet's decoder runs its tokens in several streams, one behind the other."""
    ngram: Any = getattr(around, "ngram", None)
    return mask.repeat(1, 1 + ngram) if mask is not None and isinstance(ngram, int) else mask


def before_picture(around: Any, batch: Mapping[str, Any], mask: Tensor | None) -> Tensor | None:
    """LayoutLM v2 and v3 put the places of a page's picture behind its words; all of them count."""
    config: Any = getattr(around, "config", None)
    places = 0
    if "image" in batch and hasattr(config, "image_feature_pool_shape"):
        places = config.image_feature_pool_shape[0] * config.image_feature_pool_shape[1]
    elif "pixel_values" in batch and getattr(config, "visual_embed", False):
        places = around.pos_embed.shape[1]
    return mask if mask is None or not places else torch.cat([mask, mask.new_ones(len(mask), places)], dim=1)


def target_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """A decoder reads its labels shifted by one, so a position without a label is padding in what it gives."""
    labels = plane(batch, "labels")
    return None if labels is None else labels != IGNORED_LABEL


def plane(batch: Mapping[str, Any], key: str, default: Tensor | None = None) -> Tensor | None:
    """The 2-D tensor that `batch` has at `key`."""
    found = batch.get(key)
    return found if isinstance(found, Tensor) and found.dim() == 2 else default


def valid_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """bool [batch, tokens] for states [batch, tokens, features]; all of them where there is no mask.

    Raises InvalidInput where the mask is of another shape than the states.
    """
    if mask is None:
        return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
    if mask.shape != states.shape[:-1]:
        raise InvalidInput(
            f"the token mask is {list(mask.shape)} where the model runs {list(states.shape[:-1])} tokens; give a token_mask "
            "that fits what the loss runs."
        )
    return mask.to(states.device).bool()
