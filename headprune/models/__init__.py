"""What a head is in each model family: sites, adapters and gates."""

from headprune.models import (
    bert,
    fused,
    fused_vision,
    grouped,
    guessed,
    latent,
    levit,
    longformer,
    parakeet,
    prophetnet,
    sam,
    separate,
    shared_keys,
    t5,
    timm,
    variable_head,
    wavlm,
    xlnet,
)
from headprune.models.adapters import Adapter, attention_sites, register_adapter
from headprune.models.gating import gated
from headprune.models.site import AttentionSite, HeadTensor, ProjectionHeads

__all__ = [
    "Adapter",
    "AttentionSite",
    "HeadTensor",
    "ProjectionHeads",
    "attention_sites",
    "bert",
    "fused",
    "fused_vision",
    "gated",
    "grouped",
    "guessed",
    "latent",
    "levit",
    "longformer",
    "parakeet",
    "prophetnet",
    "register_adapter",
    "sam",
    "separate",
    "shared_keys",
    "t5",
    "timm",
    "variable_head",
    "wavlm",
    "xlnet",
]
