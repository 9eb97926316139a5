"""What a language model gives each token of a text: its negative log-likelihood, and whether it is ranked first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headprune.evaluation.data import placed
from headprune.evaluation.metric import ranked_first
from headprune.models.streamed import streamed_of
from headprune.scoring.causal_losses import TOKENS, up_to_the_head

log = logging.getLogger("headprune")
Predicted = tuple[Tensor, Tensor]
LARGE = 1 << 28  # bytes of fp32 logits; below, one pass costs less time than parts
PROBE, PROBE_PART = 32, 8  # tokens
STEPS = 4  # of the model's dtype that two ways to compute the same logits may lie apart


def predictor(model: nn.Module, rows: int, probe: Tensor) -> Callable[[Tensor], Predicted]:
    """`predicted` of `model` for [`rows`, tokens]; in parts where all logits would be large and `model` can be taken apart at its
    head, which is tried on the first tokens of `probe` [tokens]."""
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", 0)
    if rows * len(probe) * vocabulary * 4 < LARGE or not runs_in_parts(model, probe[None, :PROBE]):
        return partial(predicted, model)
    return partial(predicted_in_parts, model)


def predicted(model: nn.Module, rows: Tensor) -> Predicted:
    """(negative log-likelihood, whether ranked first) of every token of `rows` but the first, [rows, tokens - 1], on the CPU."""
    found = model(**placed(model, {"input_ids": rows}), use_cache=False).logits.float()[:, :-1]
    return judged(found, rows[:, 1:])


def predicted_in_parts(model: nn.Module, rows: Tensor, tokens: int = TOKENS) -> Predicted:
    """As `predicted`; of the logits only those of about `tokens` tokens are there at a time. Raises what a model raises that cannot
    be taken apart."""
    streamed = streamed_of(model)
    inputs: Mapping[str, Any] = {**placed(model, {"input_ids": rows}), "use_cache": False}
    step, parts = max(1, tokens // len(rows)), []
    with nullcontext() if streamed is None else streamed.holding(None):  # embeddings and head are read once
        below = up_to_the_head(model, inputs)
        for start in range(0, rows.shape[1] - 1, step):
            states = below.states[:, start : min(start + step, rows.shape[1] - 1)]
            logits = below.logits(states, start).float()
            parts.append(judged(logits, rows[:, start + 1 : start + 1 + logits.shape[1]]))
    return torch.cat([losses for losses, _ in parts], dim=1), torch.cat([hits for _, hits in parts], dim=1)


def judged(logits: Tensor, targets: Tensor) -> Predicted:
    """logits [rows, tokens, vocabulary], fp32; targets [rows, tokens]."""
    targets = targets.to(logits.device)
    return negative_log_likelihood(logits, targets).cpu(), (ranked_first(logits) == targets).cpu()


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits [..., vocabulary], for targets [...]: fp32, with gradients. Large logits go through fp32 in parts, in the backward
    pass too, so that what their loss takes is little beside them."""
    rows, wanted = logits.flatten(0, -2), targets.flatten()
    if rows.numel() * 4 < LARGE:
        return of_rows(rows, wanted).view_as(targets)
    parts = zip(rows.split(TOKENS), wanted.split(TOKENS))
    found = [checkpoint(of_rows, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(found).view_as(targets)


def of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


@torch.inference_mode()
def runs_in_parts(model: nn.Module, probe: Tensor) -> bool:
    """Whether parts give of `probe` [1, tokens] what one pass does: some models have more behind their layers than a head."""
    whole = predicted(model, probe)[0]
    try:
        parts = predicted_in_parts(model, probe, PROBE_PART)[0]
    except Exception as error:  # whatever a model raises that is built in another way
        log.info("perplexity holds all logits of a batch: %s", " ".join(str(error).split())[:200])
        return False
    kinds = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    allowed = max(1e-4, STEPS * max((torch.finfo(kind).eps for kind in kinds), default=0.0))
    return torch.allclose(parts, whole, rtol=allowed, atol=allowed)
