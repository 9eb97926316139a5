"""onnx: one graph by torch's dynamo exporter, batch and length free, checked with onnxruntime. Ragged groups are fine."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.errors import InvalidInput, UnsupportedModel, whole_number
from headprune.models.tiny_inputs import without_padding
from headprune.surgery.export.example_inputs import CHECKED, TRACED, example_inputs
from headprune.surgery.export.same_output import same_output
from headprune.surgery.export.target import refuse_unknown, target

log = logging.getLogger("headprune")

OPSET = 20
LOUD = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")
ONE_FILE = 3 * 2**29  # bytes of weights; from there on torch puts them into a second file beside the graph


class Outputs(nn.Module):
    """A model as a function of its tensors, without a cache; gives the tensors of its output, by name."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.options = {"use_cache": False} if model.can_generate() else {}

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        found = self.model(**dict(zip(self.names, tensors)), **self.options, return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@target("onnx", "ONNX Runtime and other ONNX engines", packages=("onnx", "onnxscript", "onnxruntime"), suffix=".onnx")
@torch.no_grad()
def write_onnx(model: PreTrainedModel, path: Path, options: dict[str, Any]) -> list[str]:
    refuse_unknown(options, ("opset",))
    opset = whole_number("opset", options.get("opset", OPSET))
    notes = []
    if model._can_set_attn_implementation():
        # headprune's operator is none of ONNX's; the stock attention runs ragged layers on expanded keys and values.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # the one that is plain tensor operations
    if any(tensor.dtype == torch.bfloat16 for tensor in model.parameters()):
        notes.append("bfloat16 is written as float32: onnxruntime has few of its operators for bfloat16")
        log.info(notes[0])
        model.float()
    refuse_two_files(model, path)
    refuse_blocks(model)
    refuse_dynamic_rope(model)
    inputs = example_inputs(model, *TRACED)
    wrapped = Outputs(model.eval(), list(inputs)).eval()
    outputs = list(outputs_of(wrapped, inputs))
    save_graph(wrapped, inputs, outputs, path, opset)
    refuse_other_opset(path, opset)
    session = opened(path, type(model).__name__)
    expected, found = [], []
    for size in (TRACED, *CHECKED):
        inputs = example_inputs(model, *size)
        ours, theirs = outputs_of(wrapped, inputs), run(session, path, inputs, type(model).__name__)
        for name in outputs:
            scale = ours[name].abs().max().clamp(min=1e-6)  # each output counts alike, whatever it measures
            expected.append((without_padding(ours[name], inputs) / scale).flatten())
            found.append((without_padding(theirs[name].to(scale.device), inputs) / scale).flatten())
    check = same_output(torch.cat(expected), torch.cat(found), "onnxruntime")
    return [f"inputs: {', '.join(inputs)}; outputs: {', '.join(outputs)}", *notes, check]


def outputs_of(wrapped: Outputs, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raises UnsupportedModel where the model does not run on the example."""
    try:
        found: dict[str, Tensor] = wrapped(*inputs.values())
    except Exception as error:  # whatever a model raises on an input that it was not made for
        cause = " ".join(str(error).split())[:300]
        raise UnsupportedModel(f"{type(wrapped.model).__name__} does not run on {described(inputs)}: {cause}") from error
    return found


def described(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())


def save_graph(wrapped: Outputs, inputs: dict[str, Tensor], outputs: list[str], path: Path, opset: int) -> None:
    """Raises UnsupportedModel where torch's exporter does not take the model."""
    name, axes = type(wrapped.model).__name__, tuple(free_axes(value) for value in inputs.values())
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                wrapped, tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs), output_names=outputs,
                dynamic_shapes=(axes,), opset_version=opset,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise UnsupportedModel(
            f"torch's ONNX exporter does not take {name}: {cause} Export to stock, which torch.compile takes, or try its older "
            "exporter (torch.onnx.export with dynamo=False), and what that gives for other lengths."
        ) from error
    if program is None:
        raise UnsupportedModel(f"torch's ONNX exporter gave nothing for {name}.")
    program.save(str(path))


def refuse_other_opset(path: Path, opset: int) -> None:
    """UnsupportedModel where the exporter could not write the graph in `opset`, of which it says no more than a line in its log."""
    import onnx

    domains = {entry.domain: entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import}
    if domains.get("", opset) != opset:
        raise UnsupportedModel(
            f"torch's ONNX exporter writes this model in opset {domains['']}, not {opset}; give opset={domains['']}."
        )


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Inside the block torch does not warn of torchvision's operators, which no model here has, and of its own old calls, and does
    not print what it has traced of a model that it then refuses."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, LOUD)}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def free_axes(value: Tensor) -> dict[int, Any]:
    """Batch and, for tokens and where they stand on a page, length."""
    of_tokens = value.dim() == 2 or not value.is_floating_point()
    return dict.fromkeys(range(2 if of_tokens else 1), torch.export.Dim.AUTO)


def refuse_two_files(model: PreTrainedModel, path: Path) -> None:
    """A file is written under another name first, which its second file would keep; a folder holds both."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > ONE_FILE and path.suffix != ".onnx":
        raise InvalidInput(
            f"the weights take {size / 2**30:.1f} GiB; from {ONE_FILE / 2**30:.1f} on an ONNX graph keeps them in a second file. "
            "Give a folder to write to, which gets model.onnx and model.onnx.data."
        )


def refuse_blocks(model: PreTrainedModel) -> None:
    """BigBird attends to blocks of a long text and to all of a short one; of a graph, which holds one of both, it would be all,
    however long the text is."""
    if any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
        raise UnsupportedModel(
            f"{type(model).__name__} attends to blocks of long texts and to all of short ones; a graph holds one of both. Put "
            '"attention_type": "original_full" into its config.json, or call set_attention_type, to export the attention to all.'
        )


def refuse_dynamic_rope(model: PreTrainedModel) -> None:
    """Its rotation changes where a text is longer than those that the model was trained on."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    if any("dynamic" in (kind.values() if isinstance(kind, dict) else [kind]) for kind in kinds):
        raise UnsupportedModel(
            f"{type(model).__name__} rotates long texts by their length (dynamic NTK), and all texts of a graph are rotated alike. "
            'Put "rope_type": "default" into its config.json, which is the same up to max_position_embeddings.'
        )


def run_or_refuse(work: Callable[[], Any], path: Path, what: str) -> Any:
    """UnsupportedModel where onnxruntime fails at `work`, which is done to the graph of `what`."""
    try:
        return work()
    except Exception as error:  # onnxruntime's errors have no other class in common
        cause = " ".join(str(error).split())[:300]
        why = "its code computes in bfloat16, whatever the weights are. " if has_bfloat16(path) else ""
        raise UnsupportedModel(f"onnxruntime does not run the graph of {what}: {why}{cause}") from error


def opened(path: Path, name: str) -> Any:
    """An onnxruntime.InferenceSession on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the error
    return run_or_refuse(lambda: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), path, name)


def run(session: Any, path: Path, inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The outputs of the graph, by name."""
    arrays = {key: value.cpu().numpy() for key, value in inputs.items()}
    found = run_or_refuse(lambda: session.run(None, arrays), path, f"{name} on {described(inputs)}")
    return {one.name: torch.from_numpy(value) for one, value in zip(session.get_outputs(), found)}


def has_bfloat16(path: Path) -> bool:
    """Whether a node of the graph casts to it."""
    import onnx

    casts = (node for node in onnx.load(str(path), load_external_data=False).graph.node if node.op_type == "Cast")
    return any(attribute.i == onnx.TensorProto.BFLOAT16 for node in casts for attribute in node.attribute)
