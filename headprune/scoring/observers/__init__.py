"""What measures each need; importing this package registers them."""

from headprune.scoring.observers import gate_gradient, gram, masks, weights

__all__ = ["gate_gradient", "gram", "masks", "weights"]
