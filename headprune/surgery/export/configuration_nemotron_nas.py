"""The config of a nemotron-nas folder: Llama's, with a block for each layer.

headprune writes this file beside the weights, so that an engine that loads the folder with --trust-remote-code finds the blocks as
objects: `config.block_configs[0].attention.n_heads_in_group`.
"""

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class Block(SimpleNamespace):
    """Values of a layer or of a part of it, as attributes."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value.to_dict() if isinstance(value, Block) else value for name, value in vars(self).items()}


def block(content: dict[str, Any]) -> Block:
    return Block(**{name: block(value) if isinstance(value, dict) else value for name, value in content.items()})


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.block_configs = [block(one) if isinstance(one, dict) else one for one in block_configs or ()]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "block_configs": [one.to_dict() for one in self.block_configs]}
