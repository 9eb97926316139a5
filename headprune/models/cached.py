"""What a key/value cache holds of one token at one attention."""

from __future__ import annotations

from dataclasses import dataclass

from headprune.head_map import HeadMap


@dataclass(frozen=True)
class CachedFeatures:
    """Numbers in the cache for each query head, for each key/value head, and apart from heads (latents), as the model's own
    forward fills it."""

    query_head: int = 0
    kv_head: int = 0
    shared: int = 0

    def of(self, head_map: HeadMap) -> int:
        """Numbers per token; 0 without heads (the placeholder that then counts tokens is left out), but for key/value heads that
        others read."""
        if not head_map.query_heads and not head_map.kv_heads:
            return 0
        return head_map.query_heads * self.query_head + head_map.kv_heads * self.kv_head + self.shared
