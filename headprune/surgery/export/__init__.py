"""Pruned models for other engines: each target in a file of its own that registers itself."""

from headprune.surgery.export import gguf, nemotron_nas, onnx, stock, vllm
from headprune.surgery.export.regularise import Regularised, regularise
from headprune.surgery.export.target import Exported, Target, export, targets

__all__ = ["Exported", "Regularised", "Target", "export", "gguf", "nemotron_nas", "onnx", "regularise", "stock", "targets", "vllm"]
