"""onnx: one graph by torch's dynamo exporter, batch and length free, checked with onnxruntime. Ragged groups are fine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.errors import UnsupportedModel
from headprune.models.tiny_inputs import tiny_inputs
from headprune.surgery.export.same_output import same_output, small_output
from headprune.surgery.export.target import refuse_unknown, target


class FirstOutput(nn.Module):
    """A model as a function of its tensors, without a cache."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.options = {"use_cache": False} if model.can_generate() else {}

    def forward(self, *tensors: Tensor) -> Tensor:
        output: Tensor = self.model(**dict(zip(self.names, tensors)), **self.options)[0]
        return output


@target("onnx", "ONNX Runtime and other ONNX engines", packages=("onnx", "onnxscript", "onnxruntime"), suffix=".onnx")
def write_onnx(model: PreTrainedModel, path: Path, options: dict[str, Any]) -> list[str]:
    refuse_unknown(options, ("opset",))
    if model._can_set_attn_implementation():
        # headprune's operator is none of ONNX's; the stock attention runs ragged layers on expanded keys and values.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # the one that is plain tensor operations
    model.eval()
    expected = small_output(model)
    inputs = tiny_inputs(model) or {}  # small_output refuses a model without
    wrapped, names = FirstOutput(model, list(inputs)).eval(), list(inputs)
    output = "logits" if model.get_output_embeddings() is not None else "last_hidden_state"
    axes = tuple(free_axes(value) for value in inputs.values())
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                wrapped, tuple(inputs.values()), dynamo=True, verbose=False, input_names=names, output_names=[output],
                dynamic_shapes=(axes,), opset_version=options.get("opset", 20),
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise UnsupportedModel(f"torch's ONNX exporter does not take {type(model).__name__}: {cause}") from error
    if program is None:
        raise UnsupportedModel(f"torch's ONNX exporter gave nothing for {type(model).__name__}.")
    program.save(str(path))
    return [f"inputs: {', '.join(names)}; output: {output}", same_output(expected, run(path, inputs), "onnxruntime")]


def free_axes(value: Tensor) -> dict[int, Any]:
    """Batch and, for tokens, length."""
    return dict.fromkeys(range(2 if value.dim() == 2 else 1), torch.export.Dim.AUTO)


def run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of the graph, with padded rows set to 0."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
    mask = inputs.get("attention_mask")
    return output * mask[..., None].to(output.dtype) if mask is not None and output.shape[:2] == mask.shape else output
