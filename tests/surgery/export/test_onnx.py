"""onnx graphs: onnxruntime gives what the pruned model gives, at batch sizes and lengths that the export did not try."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tiny_decoders import decoder
from tiny_encoders import CLIP, ENCODERS, SEQ2SEQ, TEXT, VISION, Family
from tiny_models import bert, llama, tokens

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.models import attention_sites
from headprune.surgery import cut, load, save
from headprune.surgery.export import export, onnx

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def ragged(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    sites = attention_sites(model)
    cut(model, {site.name: [0, 3] if index % 2 else [0, 1, 2] for index, site in enumerate(sites)})
    return model


def small(family: Family, **options) -> Callable[[], transformers.PreTrainedModel]:
    """Of one layer where that says as much: torch's exporter takes seconds for each."""
    return replace(family, options={**family.options, **options}).make


def classifier() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1})).eval()


def pictures(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))


def text(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = tokens(rows, length, seed=7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(path, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {one.name: inputs[one.name].numpy() for one in session.get_inputs()})
    return dict(zip([one.name for one in session.get_outputs()], found))


def pair(rows: int, length: int) -> dict[str, torch.Tensor]:
    return {**text(rows, length), "token_type_ids": (torch.arange(length) >= length // 2).long().expand(rows, length)}


def page(rows: int, length: int) -> dict[str, torch.Tensor]:
    corner = torch.randint(0, 40, (rows, length, 2), generator=torch.Generator().manual_seed(rows))
    return {**pair(rows, length), "bbox": torch.cat([corner, corner + 9], dim=-1)}


CASES = {
    "layoutlmv3": (small(ENCODERS["layoutlmv3"], num_hidden_layers=1), page, ["logits"]),
    "llama": (llama, text, ["logits"]),
    "classifier": (classifier, pair, ["logits"]),
    "swin": (small(VISION["swin"], depths=[2], num_heads=[4]), lambda rows, _: {"pixel_values": pictures(rows)}, ["logits"]),
    "clip": (
        small(VISION["clip"], **{part: {**CLIP[part], "num_hidden_layers": 1} for part in ("text_config", "vision_config")}),
        lambda rows, length: {**text(rows, length), "pixel_values": pictures(rows + 1)},
        ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"],
    ),
    "bart": (
        small(SEQ2SEQ["bart"], encoder_layers=1, decoder_layers=1),
        lambda rows, length: {**text(rows, length), "decoder_input_ids": tokens(rows, 11, seed=3)},
        ["logits", "encoder_last_hidden_state"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_the_models_at_other_sizes(name, tmp_path):
    make, batch, outputs = CASES[name]
    model = ragged(make())
    export(model, "onnx", tmp_path / "model.onnx")
    options = {"use_cache": False} if model.can_generate() else {}
    for rows, length in ((2, 23), (1, 5)):
        inputs = batch(rows, length)
        found = run(tmp_path / "model.onnx", inputs)
        with torch.no_grad():
            expected = model(**inputs, **options)
        assert list(found) == outputs
        for one in outputs:
            assert np.abs(found[one] - expected[one].numpy()).max() < 1e-4


def test_bfloat16_becomes_float32_and_the_export_says_so(tmp_path, caplog):
    model = ragged(bert(layers=1)).to(torch.bfloat16)
    with caplog.at_level(logging.INFO, "headprune"):
        report = export(model, "onnx", tmp_path / "model.onnx")
    assert "bfloat16 is written as float32" in str(report)
    assert "bfloat16 is written as float32" in caplog.text
    assert model.dtype == torch.bfloat16
    inputs = pair(2, 7)
    with torch.no_grad():
        expected = model.float()(**inputs)
    found = run(tmp_path / "model.onnx", inputs)
    for name in ("last_hidden_state", "pooler_output"):
        assert np.abs(found[name] - expected[name].numpy()).max() < 1e-4


def test_torchs_exporter_is_quiet(tmp_path, capfd, recwarn):
    export(bert(), "onnx", tmp_path / "out.onnx")
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
    assert "torchvision" not in capfd.readouterr().err


def test_a_model_that_torchs_exporter_gives_up_is_refused_without_what_it_traced(tmp_path, capfd):
    """Longformer asks how long the text is. torch prints the graph each time that it gives up: hundreds of lines."""
    model = ENCODERS["longformer"].make()
    with pytest.raises(UnsupportedModel, match=r"does not take Longformer\w+: Could not guard.*Export to stock, .*dynamo=False"):
        export(model, "onnx", tmp_path / "model.onnx")
    told = capfd.readouterr()
    assert "forward" not in told.out + told.err


def test_a_graph_that_onnxruntime_does_not_run_is_refused_in_one_line(tmp_path):
    """Falcon rounds its ALiBi biases to bfloat16, in fp32 too."""
    with pytest.raises(UnsupportedModel, match=r"graph of FalconForCausalLM: its code computes in bfloat16") as found:
        export(decoder("falcon_alibi", num_hidden_layers=1), "onnx", tmp_path / "model.onnx")
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_a_second_file_need_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx, "ONE_FILE", 1000)
    with pytest.raises(InvalidInput, match=r"Give a folder to write to, which gets model\.onnx and model\.onnx\.data"):
        export(bert(), "onnx", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_onnx_cannot_say_is_refused(monkeypatch, tmp_path):
    def refuse(*_, **__):  # as it does for DeepSeek-V2, which rotates by complex numbers
        raise torch.onnx.OnnxExporterError("no ONNX function for aten.view_as_complex.default")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UnsupportedModel, match="ONNX exporter does not take BertModel: no ONNX function for aten"):
        export(bert(), "onnx", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_run_on_the_example_is_refused(tmp_path):
    model = llama()

    def fail(*_, **__):
        raise ValueError("Cannot handle batch sizes > 1\nif no padding token is defined.")

    model.register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedModel, match=r"does not run on input_ids \[2, 6\].*: Cannot handle"):
        export(model, "onnx", tmp_path / "model.onnx")


def test_an_opset_that_the_exporter_does_not_write_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="opset is 'new'; expected a whole number"):
        export(bert(), "onnx", tmp_path / "a.onnx", opset="new")
    with pytest.raises(UnsupportedModel, match=r"writes this model in opset 18, not 5; give opset=18"):
        export(bert(layers=1), "onnx", tmp_path / "a.onnx", opset=5)
    assert list(tmp_path.iterdir()) == []


def test_attention_to_blocks_of_a_long_text_is_refused(tmp_path):
    """The lengths that an export tries are short, and BigBird's attention is another one there."""
    model = small(ENCODERS["big_bird"], num_hidden_layers=1)()
    with pytest.raises(UnsupportedModel, match=r'a graph holds one of both\. Put "attention_type": "original_full" into'):
        export(model, "onnx", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    model.base_model.set_attention_type("original_full")
    export(model, "onnx", tmp_path / "model.onnx")
    inputs = pair(2, 30)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert np.abs(run(tmp_path / "model.onnx", inputs)["logits"] - expected.numpy()).max() < 1e-4


def test_a_rotation_by_the_length_is_refused_and_the_same_for_short_texts_is_taken(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = save(llama(layers=1, rope_parameters=rope), tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r'dynamic NTK.*Put "rope_type": "default" into its config\.json'):
        export(load(model), "onnx", tmp_path / "model.onnx")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"rope_type": "dynamic"', '"rope_type": "default"'))
    export(load(model), "onnx", tmp_path / "model.onnx")
    with torch.no_grad():
        expected = llama(layers=1, rope_parameters=rope)(input_ids=tokens(2, 100)).logits
    found = run(tmp_path / "model.onnx", {"input_ids": tokens(2, 100), "attention_mask": torch.ones(2, 100, dtype=torch.long)})
    assert np.abs(found["logits"] - expected.numpy()).max() < 1e-4
