"""How gates reach the heads of a model: in the attention operator where the model runs ours, else before the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models.gating import gate_columns, output_input_hook
from headprune.models.site import AttentionSite
from headprune.models.uncompiled import uncompiled
from headprune.models.watching import watching
from headprune.ops.gate import gated_attention
from headprune.ops.watch import Watcher
from headprune.scoring.passes import in_eval_mode


@torch.no_grad()
def through_operator(model: nn.Module, sites: Mapping[str, AttentionSite], run: Callable[[], Any]) -> frozenset[str]:
    """The sites whose attention our operator computes, seen in `run()`, one pass of the model."""
    found: set[str] = set()
    with in_eval_mode(model), uncompiled(model), watching(sites.values(), lambda site: Watcher(lambda *_: found.add(site.name))):
        run()
    return frozenset(found)


@contextmanager
def gates_in_place(sites: Mapping[str, AttentionSite], operator: frozenset[str], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block each head's output is multiplied by its gate, differentiable. gates: site name -> [query_heads]; operator:
    the sites where the operator does it, for which heads closed to 0 cost nothing."""
    with ExitStack() as stack:
        for name, site in sites.items():
            gate = gates[name].to(site.output.module.weight.device)
            if name in operator:
                stack.enter_context(gated_attention(site.dispatcher, gate))
            else:
                stack.enter_context(output_input_hook(site, gate_columns(site.by_column(gate))))
        yield


def column_norms(site: AttentionSite) -> Tensor:
    """[query_heads], fp32: the L2 norm of each head's columns of the output projection."""
    norms: Tensor = site.output.head_weights().float().flatten(1).norm(dim=1)
    return norms.cpu()
