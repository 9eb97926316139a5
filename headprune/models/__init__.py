"""What a head is in each model family: sites, adapters, gates, and our attention inside transformers."""

from headprune.models import attention_interface, bert, llama, variable_head
from headprune.models.adapters import Adapter, attention_sites, register_adapter
from headprune.models.gating import gated
from headprune.models.site import AttentionSite, ProjectionHeads

__all__ = [
    "Adapter",
    "AttentionSite",
    "ProjectionHeads",
    "attention_interface",
    "attention_sites",
    "bert",
    "gated",
    "llama",
    "register_adapter",
    "variable_head",
]
