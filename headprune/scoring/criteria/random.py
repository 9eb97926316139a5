"""The control that every other criterion has to beat."""

import zlib

import torch
from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import SiteObservations


@criterion("random", needs=(), source="control", cost="no data")
def random(observed: SiteObservations) -> Tensor:
    """Uniform random scores, the same for the same site shape and name."""
    seed = zlib.crc32(repr((observed.name, observed.shape.head_map.kv_of_query)).encode())
    return torch.rand(observed.shape.head_map.query_heads, generator=torch.Generator().manual_seed(seed))
