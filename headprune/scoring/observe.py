"""One pass over the data that measures all that is asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name
from headprune.models import attention_sites
from headprune.models.batches import several
from headprune.models.checkpointing import checkpointed
from headprune.models.site import AttentionSite
from headprune.models.streamed import streamed_of
from headprune.models.token_kinds import TokenKinds
from headprune.models.tokens import TokenMask, token_masks
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention
from headprune.scoring.batch_identity import checksum
from headprune.scoring.observations import Need, Observations
from headprune.scoring.observer import LossFunction, Observer, Setting, observer_of
from headprune.scoring.passes import frozen, pass_of, refuse_without_weights, run_batch, same_keys, snapshot
from headprune.scoring.ran_batch import RanBatch
from headprune.scoring.ranks import Distributed, check_mode, merged, own_part, rank_file, refuse_different_batches, world_size
from headprune.scoring.site_shape import SiteShape
from headprune.scoring.streamed import observe_streamed
from headprune.scoring.trimming import Trimming

log = logging.getLogger("headprune")
CHECKPOINT_SECONDS = 60.0
UNREACHED = ("error", "keep")


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Need | str],
    *,
    loss_fn: LossFunction | None = None,
    token_mask: TokenMask | None = None,
    token_kinds: TokenKinds | Any = None,
    checkpointing: bool = False,
    gram_device: torch.device | str | None = None,
    unreached: Literal["error", "keep"] = "error",
    checkpoint: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    distributed: Distributed = "share",
) -> Observations:
    """Measures what `needs` names, in one pass over `batches`.

    Args:
        batches: dicts for `model(**batch)` whose output has a `loss`, or anything that `loss_fn` understands. Not read
            where only weights are needed. Padding behind the longest sample of a batch is left out where that changes nothing.
        needs: members of Need, or their values ("weights", "gate_gradient", "attention", ...).
        loss_fn: `loss_fn(model, batch)` gives per-sample losses [n] (exact per-sample gradients) or their mean.
        token_mask: `token_mask(batch)` gives bool [batch, tokens] of the tokens that count in Gram matrices and in statistics of
            the forward pass, or None for all; default the batch's own masks (headprune.models.tokens.token_masks).
        token_kinds: a tokenizer, or TokenKinds: which ids are special or punctuation, for attention_pattern.
        checkpointing: keep no activations inside the layers of a transformers model: they are computed again in the backward
            pass, so that the memory of gradients stays near that of inference; about a third more time.
        gram_device: where Gram matrices are summed, in fp64; default the device of the site. "cpu" spares a GPU's memory.
        unreached: what to do with attentions that no batch runs through (the vision tower of a model that sees text only):
            "error", or "keep" all of their heads.
        checkpoint: a file that keeps what was observed, written about once a minute and at the end. Where it exists the pass
            goes on behind the batches that it holds; they must be the same again. For a model that is read layer by layer
            (`hp.open_streamed`) a folder, which also holds the states between layers: it goes on behind the last layer.
        progress: called with the number of batches done (layer by layer: of batches through all layers).
        distributed: where torch.distributed runs several ranks, what each does. "share": all are given the same batches and each
            observes its part; "own": each is given batches of its own; either way all ranks return the observations of all
            batches. "off": this rank observes all of its batches by itself. Each rank keeps a checkpoint of its own.

    Raises InvalidInput where `batches` is empty or their keys differ, a loss is missing or not finite, a site is never
    reached, or a checkpoint is of another model or other data.
    """
    check_arguments(observe, locals())
    if unreached not in UNREACHED:
        raise unknown_name("value of unreached", unreached, UNREACHED)
    check_mode(distributed)
    if distributed != "off" and world_size() > 1:
        options = {
            "loss_fn": loss_fn, "token_mask": token_mask, "token_kinds": token_kinds, "checkpointing": checkpointing,
            "gram_device": gram_device, "checkpoint": checkpoint and rank_file(checkpoint), "progress": progress,
        }  # fmt: skip
        return observe_together(model, batches, needs, distributed, unreached, options)
    model = plain_module(model)
    kinds = None if token_kinds is None else TokenKinds.of(token_kinds)
    with own_attention(model):
        every = attention_sites(model, quantised=True)
        sites, headless = (tuple(site for site in every if bool(site.head_map.query_heads) is has) for has in (True, False))
        setting = Setting(model, sites, loss_fn, token_masks(model, token_mask), kinds, gram_device, headless, token_mask is None)
        wanted = sorted({Need.of(need) for need in needs}, key=lambda need: need.value)
        if streamed_of(model) is not None:
            observed = in_order(observe_streamed(setting, batches, wanted, checkpoint, progress), every)
            refuse_unreached(observed, unreached)
            return observed
        if wanted:  # shapes alone do for the rest
            refuse_without_weights(model)
        earlier = taken_up(checkpoint, every, wanted)
        observers = [observer_of(need)(setting) for need in wanted]
        with checkpointed(model) if checkpointing else nullcontext():
            seen = run_pass(setting, batches, observers, earlier, checkpoint, progress)
        observed = in_order(together(earlier, snapshot(setting, observers, seen)), every)
        refuse_unreached(observed, unreached)
        if checkpoint:
            observed.save(checkpoint)
        return observed


def observe_together(
    model: nn.Module, batches: Iterable[Any], needs: Iterable[Need | str], mode: str, unreached: str, options: dict[str, Any]
) -> Observations:
    """`observe` on several ranks, whose observations become one."""
    if mode == "share":
        every = list(several(batches))
        refuse_different_batches([checksum(batch) for batch in every])
        batches = own_part(every)
    observed, problem = None, None
    try:
        observed = observe(model, batches, needs, unreached="keep", distributed="off", **options)
    except Exception as error:  # told to the others, which would wait for this rank
        problem = error
    observed = merged(observed, problem)
    refuse_unreached(observed, unreached)
    return observed


def run_pass(
    setting: Setting,
    batches: Iterable[Any],
    observers: Sequence[Observer],
    earlier: Observations | None,
    checkpoint: str | Path | None,
    progress: Callable[[int], None] | None,
) -> tuple[int, ...]:
    """Runs every batch that `earlier` does not hold, each once for all observers; gives the checksums of those batches."""
    if all(observer.runs == "nothing" for observer in observers):
        return ()
    held, keys, saved, count = earlier.seen if earlier else (), None, time.monotonic(), 0
    seen: list[int] = []
    unread: list[RanBatch] = []  # at most the last one, which a device is still at
    backward = any(observer.runs == "backward" for observer in observers)
    trimmed = Trimming(setting, observers)
    with pass_of(setting.model), ExitStack() as stack, torch.set_grad_enabled(backward):
        if backward:
            stack.enter_context(frozen(setting.model))
        for observer in observers:
            stack.enter_context(observer.watching_pass())
        for index, batch in enumerate(several(batches)):
            keys, count = same_keys(keys, batch, index), index + 1
            if index < len(held):
                refuse_other_data(held[index], batch, index, checkpoint)
            else:
                unread.append(RanBatch(batch, run_batch(setting, trimmed(batch), observers, backward)))
                saving = checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS
                left = int(unread[-1].under_way and not saving)
                while len(unread) > left:
                    seen.append(unread.pop(0).read())
                if checkpoint and saving:
                    together(earlier, snapshot(setting, observers, seen)).save(checkpoint)
                    saved = time.monotonic()
            if progress:
                progress(count)
        seen += [one.read() for one in unread]
    if keys is None:
        raise InvalidInput("the calibration set is empty; a criterion that runs the model needs at least one batch.")
    if count < len(held):
        raise InvalidInput(
            f"{checkpoint} holds {len(held)} batches and {count} were given; give the same ones again, or remove that file."
        )
    return tuple(seen)


def together(earlier: Observations | None, now: Observations) -> Observations:
    return now if earlier is None else earlier + now


def in_order(observed: Observations, sites: Sequence[AttentionSite]) -> Observations:
    """In the order of the model, in which those without heads stand among the others."""
    return Observations({site.name: observed[site.name] for site in sites}, observed.seen)


def refuse_unreached(observed: Observations, unreached: str) -> None:
    names = [name for name, site in observed.items() if not site.reached and site.shape.head_map.query_heads]
    if not names:
        return
    shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if unreached == "error" or len(names) == len(observed):
        raise InvalidInput(
            f"{shown} not reached by the calibration data or its loss; give data that runs through it, or keep all of its heads: "
            "unreached='keep', on the command line --keep-unreached, in a recipe score.unreached."
        )
    log.warning("%s not reached by the calibration data: not scored, all heads stay", shown)


def taken_up(checkpoint: str | Path | None, sites: Sequence[AttentionSite], wanted: Sequence[Need]) -> Observations | None:
    """What an earlier try of the same pass left in `checkpoint`."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    earlier = Observations.load(checkpoint)
    if {name: site.shape for name, site in earlier.items()} != {site.name: SiteShape.of(site) for site in sites}:
        raise InvalidInput(f"{checkpoint} holds observations of another model; remove it or give another checkpoint.")
    measured = [site for site in earlier.values() if site.shape.head_map.query_heads]
    if any(site.has(need) != (need in wanted) for site in measured for need in Need):
        raise InvalidInput(
            f"{checkpoint} holds other needs than {', '.join(need.value for need in wanted)}; remove it or give another checkpoint."
        )
    log.info("taking up %s: %d batches are done", checkpoint, len(earlier.seen))
    return earlier


def refuse_other_data(expected: int, batch: Any, index: int, checkpoint: str | Path | None) -> None:
    if checksum(batch) != expected:
        raise InvalidInput(f"batch {index} is not the one that {checkpoint} holds; remove that file to start again.")
