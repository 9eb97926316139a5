"""Gates on heads multiplied into the output projections, so that the gates can go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name
from headprune.models.gating import sites_by_name
from headprune.nn.replace import on_own_attention
from headprune.surgery.cut import check_owned_alone


@on_own_attention
@torch.no_grad()
def fold_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> None:
    """Gives `model` without gates the output that it has with `gates` (site name -> [query_heads]), in place.

    The columns of head h in the output projection are multiplied by its gate; exact but for rounding, and where all gates of a
    site are 1 nothing is touched. Raises InvalidInput for an unknown site, another number of heads or a gate that is not finite,
    UnsupportedModel where an output projection is also used elsewhere, or a mask makes its weight at each call.
    """
    check_arguments(fold_gates, {"gates": gates})
    sites = sites_by_name(model)
    for name, gate in gates.items():
        if name not in sites:
            raise unknown_name("attention site", name, sites)
        heads = sites[name].head_map.query_heads
        if not isinstance(gate, Tensor) or tuple(gate.shape) != (heads,) or not gate.isfinite().all():
            shown = gate.tolist() if isinstance(gate, Tensor) else gate
            raise InvalidInput(f"gates of {name}: {shown!r:.80}; expected a tensor of {heads} finite numbers.")
    touched = {name: gate for name, gate in gates.items() if not bool((gate == 1).all())}
    check_owned_alone(model, [replace(sites[name], projections=sites[name].outputs) for name in touched])
    for name, gate in touched.items():
        for output in sites[name].outputs:
            weight = output.module.weight
            columns = sites[name].by_column(gate.to(weight.device, torch.float64))
            shape = [-1 if dim == output.weight_dim else 1 for dim in range(weight.dim())]
            weight.copy_((weight.double() * columns.view(shape)).to(weight.dtype))
