"""What a forward pass shows to distillation: outputs, hidden states, attention outputs, queries, keys and values, caught by hooks.

Hooks stand on modules by name, so that a layer that an adapter has wrapped is seen with its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.site import AttentionSite
from headprune.models.stream import first_tensor
from headprune.models.uncompiled import uncompiled

Caught = dict[str, list[Tensor]]


@dataclass
class Features:
    """What was caught, one entry per call (a loss may call the model several times).

    outputs: what the model returned. hidden: site name -> output of the block around the attention, [batch, tokens, hidden].
    attention: site name -> what the attention adds to the residual stream, [batch, tokens, hidden]. query, key, value: site
    name -> that projection's output, [batch, tokens, heads * head_dim], before any rotary embedding; gates are left out.
    """

    outputs: list[Any] = field(default_factory=list)
    hidden: Caught = field(default_factory=dict)
    attention: Caught = field(default_factory=dict)
    query: Caught = field(default_factory=dict)
    key: Caught = field(default_factory=dict)
    value: Caught = field(default_factory=dict)


@contextmanager
def catching(model: nn.Module, sites: Iterable[AttentionSite], wanted: Mapping[str, Iterable[str]]) -> Iterator[Features]:
    """Inside the block the Features of `model`'s forward passes are caught.

    wanted: field of Features -> names of the sites to catch it at. The outputs always are.
    """
    found = Features()
    by_name = {site.name: site for site in sites}
    with uncompiled(model), ExitStack() as stack:
        stack.callback(model.register_forward_hook(lambda _m, _a, output: found.outputs.append(output)).remove)
        for kind, names in wanted.items():
            for name in names:
                module = module_at(model, PLACE[kind](by_name[name]), kind)
                stack.callback(module.register_forward_hook(appending(getattr(found, kind), name)).remove)
        yield found
    # Behind the pass, not in it: a checkpointed layer that runs again in the backward pass does so without hooks, and must save as
    # many tensors as the first time.
    for role in ("query", "key", "value"):
        caught = getattr(found, role)
        for name, outputs in caught.items():
            site = by_name[name]
            features = site.projection(role).features
            features = features[:, : site.head_dim if role == "query" else None].flatten()
            caught[name] = [output.index_select(-1, features.to(output.device)) for output in outputs]


def module_at(model: nn.Module, path: str, kind: str) -> nn.Module:
    """InvalidInput where a projection is no module, whose output a hook could see."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise InvalidInput(
            f"{path} of {type(model).__name__} is a parameter, not a layer, so that {kind} is not seen there; distil logits or "
            "hidden states."
        ) from None


def appending(caught: Caught, name: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found = first_tensor(output if isinstance(output, tuple) else (output,))
        if found is not None:
            caught.setdefault(name, []).append(found)

    return hook


# Field of Features -> path of the module whose output it is.
PLACE: dict[str, Callable[[AttentionSite], str]] = {
    "hidden": lambda site: site.name.rpartition(".")[0],  # around the attention: a layer, in every family of transformers
    "attention": lambda site: site.output.name,
    "query": lambda site: site.projection("query").name,
    "key": lambda site: site.projection("key").name,
    "value": lambda site: site.projection("value").name,
}
