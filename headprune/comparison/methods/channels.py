"""Structured pruning of feed-forward channels through Torch-Pruning (Fang et al. 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headprune.comparison.method import Compressed, Refused, Subject, comparison_method
from headprune.models import attention_sites
from headprune.models.feed_forward import feed_forwards
from headprune.models.site import Foreign
from headprune.models.stream import first_tensor


@dataclass(frozen=True)
class Channels:
    """One feed-forward. last: the linear layer that ends it. scores [channels]. cost: parameters of a channel."""

    last: nn.Module
    scores: Tensor
    cost: int


@comparison_method(
    "channels", label="channels", kind="structured pruning", granularity="feed-forward channels",
    library="torch-pruning",
)  # fmt: skip
def channels(subject: Subject) -> Compressed:
    """Cuts the feed-forward channels of least Taylor importance in the whole model, as many parameters as head pruning removes."""
    try:
        import torch_pruning as tp
    except ImportError:
        raise Refused('torch-pruning is not installed: pip install "headprune[comparison]"') from None
    model: Foreign = subject.copy()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation is not None:
        model.set_attn_implementation("eager")  # its graph follows autograd's nodes, and knows those
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph, found = scored(tp, subject, model)
        gone = least(found, subject.removed)
        for name, indices in gone.items():
            graph.get_pruning_group(found[name].last, tp.prune_linear_in_channels, idxs=indices).prune()
    for parameter, was in zip(model.parameters(), trained, strict=True):
        parameter.grad = None
        parameter.requires_grad_(was)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    stay = ", ".join(str(len(one.scores) - len(gone.get(name, ()))) for name, one in found.items())
    return Compressed(
        model, f"channels that stay, by layer: {stay} of {', '.join({str(len(one.scores)) for one in found.values()})}"
    )


def scored(tp: Any, subject: Subject, model: nn.Module) -> tuple[Any, dict[str, Channels]]:
    """Its graph of the model, and each feed-forward by the name of its attention."""
    task, batch = subject.task, subject.calibration[0]
    found_ends = feed_forwards(model, attention_sites(model), lambda: task.forward(model, batch))
    ends = {name: end.module for name, end in found_ends.items() if isinstance(end.module, nn.Linear)}
    if not ends:
        raise Refused("no feed-forward of linear layers is seen behind its attentions")
    model.requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=batch, forward_fn=lambda model, batch: first_output(task.forward(model, batch))
    )
    for calibration in subject.calibration:
        task.loss(model, calibration).mean().backward()
    importance = tp.importance.GroupTaylorImportance()
    found = {}
    for name, last in ends.items():
        group = graph.get_pruning_group(last, tp.prune_linear_in_channels, idxs=list(range(last.in_features)))
        found[name] = Channels(last, importance(group), cost_of_a_channel(group, last))
    return graph, found


def first_output(output: Any) -> Tensor | None:
    return output if isinstance(output, Tensor) else first_tensor(tuple(output.values() if hasattr(output, "values") else output))


def cost_of_a_channel(group: Any, last: nn.Module) -> int:
    """Parameters that go with one channel. Raises Refused where others than the linear layers before `last` would lose some."""
    cost = 0
    for dependency, _ in group:
        module = dependency.target.module
        if not list(module.parameters(recurse=False)):
            continue
        if not isinstance(module, nn.Linear):
            raise Refused(f"a channel would also take parameters of a {type(module).__name__}")
        cost += module.out_features if module is last else module.in_features + int(module.bias is not None)
    return cost


def least(found: Mapping[str, Channels], budget: int) -> dict[str, list[int]]:
    """Feed-forward -> the channels to remove: the lowest of all, while their parameters fit into `budget`; one stays everywhere."""
    room = sum((len(one.scores) - 1) * one.cost for one in found.values())
    if budget > room:
        raise Refused(f"{budget:,} parameters are to go; the {len(found)} feed-forwards can spare {room:,}")
    ranked = sorted((score, name, index) for name, one in found.items() for index, score in enumerate(one.scores.tolist()))
    gone: dict[str, list[int]] = {}
    for _, name, index in ranked:
        lost = gone.setdefault(name, [])
        if found[name].cost <= budget and len(lost) < len(found[name].scores) - 1:
            lost.append(index)
            budget -= found[name].cost
    return {name: lost for name, lost in gone.items() if lost}
