"""The peers by name, in the order of the table."""

from __future__ import annotations

from peers.registry import TORCH, TRANSFORMERS_4, Peer

BASE = ("-U", "setuptools<81", "wheel")

PEERS = {
    peer.name: peer
    for peer in (
        Peer("headprune", "headprune", "run_headprune.py", options={"compensate": True}),
        Peer("headprune, cut only", "headprune", "run_headprune.py", options={"compensate": False}),
        Peer("torch-pruning", "torch-pruning", "run_torch_pruning.py"),
        Peer(
            "transformers 4, prune_heads", "transformers", "run_transformers4.py",
            installs=[[TORCH, TRANSFORMERS_4, "numpy"]],
        ),
    )
}  # fmt: skip
