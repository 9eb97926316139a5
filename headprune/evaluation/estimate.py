"""What a model will cost to score, prune and run, from its config alone: no weight is read or made."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, UnsupportedModel, unknown_name, whole_number
from headprune.evaluation.cost import cached_bytes_per_token, model_flops
from headprune.evaluation.positions import position_limit
from headprune.evaluation.sequence_flops import Lengths, runs_of, sequence_flops
from headprune.hub import local_folder
from headprune.models import attention_sites
from headprune.models.tiny_inputs import tiny_inputs
from headprune.models.tokens import decoder_of, is_inside
from headprune.models.trunk import Trunk, outermost_layers, trunk_of
from headprune.nn.replace import own_attention
from headprune.planning import Budget, plan
from headprune.scoring import score
from headprune.scoring.causal_losses import TOKENS
from headprune.scoring.passes import in_eval_mode
from headprune.surgery.checkpoint import skeleton
from headprune.surgery.cut import cut
from headprune.surgery.savings import count_parameters

log = logging.getLogger("headprune")
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """flops: dense matrix products per second at the peak, by dtype (the maker's data sheet, without sparsity; a CPU's is
    measured). memory: bytes."""

    flops: Mapping[str, float]
    memory: int


# NVIDIA's data sheets: dense tensor-core rates of bf16 (fp16 is the same) and tf32 for fp32.
DEVICES = {
    "a100-80gb": Device({"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}, 80 * 10**9),
    "h100": Device({"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}, 80 * 10**9),
    "h200": Device({"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}, 141 * 10**9),
    "l4": Device({"bfloat16": 121e12, "float16": 121e12, "float32": 60e12}, 24 * 10**9),
    "l40s": Device({"bfloat16": 362e12, "float16": 362e12, "float32": 183e12}, 48 * 10**9),
}
UTILISATION = 0.4  # of the peak rate, where nobody says better: an assumption, not a measurement
LENGTH = 2048
NOTHING = "–"


@dataclass(frozen=True)
class Cost:
    """One model. parameters: distinct ones. weight_bytes, cache_bytes_per_token: in the dtype asked for; the latter None where
    there is no cache. flops_per_token: of a forward pass over a sequence of `length` tokens, shared out among them (2 per
    multiply-add; of experts only those that a token goes through; what several layers share counts for each; convolutions only in
    models of pictures, at their own size)."""

    query_heads: int
    kv_heads: int
    parameters: int
    weight_bytes: int
    flops_per_token: int
    cache_bytes_per_token: int | None


@dataclass(frozen=True)
class Estimate:
    """The model before and after, and what scoring it by gradients takes: `tokens` tokens, `batch` sequences of `length` at a
    time, activation checkpointing, `hp.causal_losses`.

    seconds: at `utilisation` of the device's peak rate. resident_bytes: peak memory with the whole model on the device;
    streamed_bytes: with `hp.open_streamed`, which reads `read_bytes` from disk and keeps `state_bytes` of states beside it; all
    three None where the attentions lie in several stacks or run several times, which is not streamed. Of a model of pictures and
    text a token is one of each. decoder_length: of an encoder-decoder, whose `length` and tokens are its encoder's; else None.
    """

    model: str
    dtype: str
    device: str
    dense: Cost
    pruned: Cost
    tokens: int
    batch: int
    length: int
    flops: int
    utilisation: float
    seconds: float
    device_memory: int
    resident_bytes: int
    streamed_bytes: int | None
    state_bytes: int | None
    read_bytes: int | None
    decoder_length: int | None = None

    @property
    def fits(self) -> bool:
        """Whether scoring with the whole model on the device takes no more than the device's memory."""
        return self.resident_bytes <= self.device_memory

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits}

    def __rich__(self) -> Table:
        table = Table("", "before", "after", "after / before", title=f"{self.model}, {self.dtype}", title_justify="left")
        rows = {
            "query heads": "query_heads",
            "key/value heads": "kv_heads",
            "parameters": "parameters",
            "bytes of weights": "weight_bytes",
            f"FLOPs per token (of {self.lengths})": "flops_per_token",
            "cache bytes per token": "cache_bytes_per_token",
        }
        for label, field in rows.items():
            before, after = getattr(self.dense, field), getattr(self.pruned, field)
            if before is None or after is None:
                table.add_row(label, NOTHING, NOTHING, "")
                continue
            table.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.3f}" if before else "")
        return table

    @property
    def lengths(self) -> str:
        return str(self.length) if self.decoder_length is None else f"{self.length}, {self.decoder_length} in the decoder"

    def scoring(self) -> Table:
        """What scoring takes."""
        title = f"scoring by gradients: {self.tokens:,} tokens, {self.batch} x {self.length} at a time, {self.device}"
        table = Table("", "", title=title, title_justify="left", show_header=False)
        table.add_row("FLOPs", f"{self.flops:.3g}")
        table.add_row("time", f"{self.seconds:,.0f} s at {self.utilisation:.0%} of the peak rate (an assumption)")
        verdict = f"{'fits' if self.fits else 'does not fit'} into {self.device_memory / GIB:.0f} GiB"
        table.add_row("memory, all of it resident", f"{self.resident_bytes / GIB:.1f} GiB: {verdict}")
        if self.streamed_bytes is None or self.state_bytes is None or self.read_bytes is None:
            table.add_row("streamed", "not at all: its attentions lie in several stacks of layers, or layers share one")
            return table
        table.add_row("memory, streamed", f"{self.streamed_bytes / GIB:.1f} GiB")
        table.add_row("read from disk, streamed", f"{self.read_bytes / GIB:.1f} GiB")
        table.add_row("states kept on the host or disk, streamed", f"{self.state_bytes / GIB:.1f} GiB")
        return table


def estimate(
    folder: str | os.PathLike[str],
    budget: Budget,
    *,
    device: str = "cpu",
    tokens: int = 65536,
    batch: int = 4,
    length: int | None = None,
    decoder_length: int | None = None,
    dtype: torch.dtype | None = None,
    granularity: str | None = None,
    utilisation: float = UTILISATION,
) -> Estimate:
    """What the model of `folder` costs before and after, and what it takes to score it. Only its config.json is read.

    Which heads would go is not known without scores: counts per layer are equal, the heads drawn at random.

    Args:
        device: a name in DEVICES, or "cpu": this machine, whose rate is measured in a second.
        tokens: of calibration. batch, length: sequences at a time, and their length; default 2048 tokens, or as many as the model
            takes: positions of text, patches of a picture. In an encoder-decoder it is that of the encoder.
        decoder_length: tokens of the decoder; default as many, or as it takes. For encoder-decoders alone.
        dtype: of the weights; default as the config says.
        granularity: as in `hp.plan`.
        utilisation: the share of the device's peak rate that the time assumes; not measured.

    Raises InvalidInput for an unknown device or a folder without config, InfeasibleBudget where the budget cannot be met,
    UnsupportedModel where heads cannot be found.
    """
    check_arguments(estimate, locals())
    given = {"tokens": tokens, "batch": batch, "length": length, "decoder_length": decoder_length}
    for name, value in given.items():
        whole_number(name, 1 if value is None else value)
    if not 0 < utilisation <= 1:
        raise InvalidInput(f"utilisation is {utilisation}; expected the share of the peak rate that is reached, above 0, up to 1.")
    folder = local_folder(folder, weights=False)
    model = skeleton(folder)
    config: Any = model.config
    length = usual_length(model) if length is None else length
    decodes = decoder_of(model) is not None
    if decoder_length is not None and not decodes:
        raise InvalidInput(
            f"decoder_length is {decoder_length}, and {type(model).__name__} has no decoder of its own; give length."
        )
    decoder_length = usual_decoder_length(model, length) if decoder_length is None else decoder_length
    warn_of_longer("length", length, positions(model), model)
    warn_of_longer("decoder_length", decoder_length, decoder_positions(model), model)
    lengths = Lengths(length, decoder_length)
    weights: torch.dtype = dtype or config.dtype or torch.float32
    kind = str(weights).removeprefix("torch.")
    found = this_cpu(weights) if device == "cpu" else DEVICES.get(device)
    if found is None:
        raise unknown_name("device", device, ["cpu", *DEVICES])
    if kind not in found.flops:
        raise InvalidInput(f"nothing is known of the rate of {device} in {kind}; take dtype= out of {', '.join(found.flops)}.")
    chosen = plan(score(model, (), "random"), budget, allocation="uniform", granularity=granularity)
    with own_attention(model):
        runs = runs_of(model)
        dense, memory = (
            cost_of(model, lengths, weights, runs),
            Memory.of(model, batch * length, weights, batch * decoder_length, runs),
        )
    pruned = skeleton(folder)
    cut(pruned, chosen, verify=False)
    with own_attention(pruned):
        left = cost_of(pruned, lengths, weights, runs)
    flops = 3 * tokens * dense.flops_per_token  # forward, the same again in the backward pass, gradients of activations alone
    return Estimate(
        model=type(model).__name__,
        dtype=kind,
        device=device,
        dense=dense,
        pruned=left,
        tokens=tokens,
        batch=batch,
        length=length,
        flops=flops,
        utilisation=utilisation,
        seconds=flops / (found.flops[kind] * utilisation),
        device_memory=found.memory,
        resident_bytes=memory.resident,
        streamed_bytes=memory.streamed,
        state_bytes=None if memory.streamed is None else memory.state * -(-tokens // (batch * length)),
        read_bytes=None if memory.streamed is None else 2 * dense.weight_bytes,
        decoder_length=decoder_length if decodes else None,
    )


def usual_length(model: PreTrainedModel) -> int:
    """LENGTH, or where `model` takes no more, its positions, or the patches of a picture and the token before them."""
    config: Any = model.config
    size, patch = (getattr(getattr(config, "encoder", config), name, None) for name in ("image_size", "patch_size"))
    if model.main_input_name == "pixel_values" and isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2 + 1
    return min(LENGTH, positions(model) or LENGTH)


def usual_decoder_length(model: PreTrainedModel, length: int) -> int:
    """`length`, or where the decoder of `model` takes no more, its positions."""
    return min(length, decoder_positions(model) or length)


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that `model`, or its encoder, takes; None where its config does not say."""
    own = (getattr(model.config, name, None) for name in ("max_source_positions", "max_encoder_position_embeddings"))
    return next(filter(None, own), None) or position_limit(model)


def decoder_positions(model: PreTrainedModel) -> int | None:
    own = (getattr(model.config, name, None) for name in ("max_target_positions", "max_decoder_position_embeddings"))
    return next(filter(None, own), None)


def warn_of_longer(name: str, length: int, most: int | None, model: PreTrainedModel) -> None:
    if most is not None and length > most:
        log.warning("%s is %s, and %s has positions for %s tokens", name, f"{length:,}", type(model).__name__, f"{most:,}")


def cost_of(model: PreTrainedModel, lengths: Lengths, dtype: torch.dtype, runs: Mapping[str, int]) -> Cost:
    sites, parameters = attention_sites(model), count_parameters(model)
    maps = [site.head_map for site in sites]
    flops = (picture_flops(model, lengths) or sequence_flops(model, sites, lengths, runs)) // lengths.tokens
    return Cost(
        sum(head_map.query_heads for head_map in maps), sum(site.head_map.kv_heads for site in sites if site.own_keys), parameters,
        parameters * dtype.itemsize, flops, cached_bytes_per_token(model, sites, dtype.itemsize),
    )  # fmt: skip


def picture_flops(model: PreTrainedModel, lengths: Lengths) -> int | None:
    """FLOPs of all products and convolutions of a model of pictures alone, for one of the size that its config says: those of Swin
    and its like run fewer tokens from stage to stage. None for other models and lengths, and where it does not run without values.
    """
    inputs = tiny_inputs(model) if lengths.tokens == usual_length(model) else None
    if inputs is None or inputs.keys() != {"pixel_values"}:
        return None
    try:
        with in_eval_mode(model):
            return model_flops(model, inputs)
    except Exception:  # whatever a model raises on the meta device
        return None


@dataclass(frozen=True)
class Memory:
    """Bytes: the peak with all weights resident, and streamed (None where it cannot be); the states of one batch in front of all
    layers, with the keys and values that some hand to later ones."""

    resident: int
    streamed: int | None
    state: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokens: int, dtype: torch.dtype, decoder_tokens: int | None = None,
        runs: Mapping[str, int] | None = None,
    ) -> Memory:  # fmt: skip
        """For batches of `tokens` tokens, `decoder_tokens` in the decoder of an encoder-decoder; runs: as in `sequence_flops`."""
        found, size, decoder = outermost_layers(model), dtype.itemsize, decoder_of(model)
        names = {module: name for name, module in model.named_modules()}
        layers = [sum(parameter.numel() for parameter in layer.parameters()) * size for layer, _ in found]
        whole = count_parameters(model) * size
        decoded = tokens if decoder_tokens is None else decoder_tokens
        tokens_in = [decoded if is_inside(names[layer], decoder) else tokens for layer, _ in found]
        several = [(runs or {}).get(names[layer], 1) for layer, _ in found]
        entering = [many * size * hidden for many, (_, hidden) in zip(tokens_in, found)]
        states, last = sum(one * times for one, times in zip(entering, several)), max(entering)
        working = max(2 * many * size * activations(layer, hidden) for many, (layer, hidden) in zip(tokens_in, found))
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
        head = min(decoded, TOKENS) * vocabulary * (size + 8)  # logits, and their loss and gradient in fp32
        running = last + max(working, head)
        held, trunk = max(2 * max(layers), whole - sum(layers)), stack_of(model) if max(several) == 1 else None
        passed = 0 if trunk is None else 2 * tokens * size * passed_features(trunk)  # and their gradients
        return cls(whole + states + running, None if trunk is None else held + running, states + last + passed)


def stack_of(model: PreTrainedModel) -> Trunk | None:
    """The one that holds all its attentions; None where they lie in several."""
    try:
        return trunk_of(model)
    except UnsupportedModel:
        return None


def passed_features(trunk: Trunk) -> int:
    """Of the keys and values of one token that layers hand to later ones."""
    givers = [site for layer in {source.layer for source in trunk.readers.values()} for site in trunk.sites[layer]]
    return sum(site.head_map.kv_heads * (site.head_dim + site.value_dim) for site in givers)


def activations(layer: nn.Module, hidden: int) -> int:
    """Features per token that one layer keeps for its backward pass: what its linear layers give, twice where something is
    multiplied with them, and its norms."""
    weights = [getattr(module, "weight", None) for module in layer.modules()]
    matrices = [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
    return sum(weight.numel() // hidden if weight.shape[1] == hidden else hidden for weight in matrices) + 4 * hidden


def this_cpu(dtype: torch.dtype, size: int = 1024) -> Device:
    """The rate of a matrix product on this machine, the best of a few."""
    import psutil

    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return Device({str(dtype).removeprefix("torch."): 2 * size**3 / best}, psutil.virtual_memory().total)
