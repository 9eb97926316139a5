"""The check of an export sees in bf16 and fp16 what it sees in fp32, layer by layer, and leaves the model alone."""

import logging

import pytest
import torch
from tiny_decoders import decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import llama

from headprune.errors import HeadpruneError
from headprune.surgery.export.same_output import in_fp32, same_output, small_output

MAKERS = {
    **{name: family.make for name, family in (ENCODERS | SEQ2SEQ | VISION).items()},
    **{name: lambda name=name: decoder(name) for name in ("gpt2", "falcon_gqa", "gemma3", "gpt_oss", "mixtral", "bloom")},
    "tied": lambda: llama(tie_word_embeddings=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_difference_is_seen_in_half_precision(dtype):
    model = llama().to(dtype)
    expected = small_output(model)
    assert same_output(expected, small_output(model), "it").endswith("to 0.0e+00 of the largest output")
    model.model.layers[1].self_attn.o_proj.weight.data[:, :8] *= 1.05
    with pytest.raises(HeadpruneError, match="gives other outputs than the model"):
        same_output(expected, small_output(model), "it")


@pytest.mark.parametrize("name", ["t5", "whisper", "clip", "vit", "swin", "bert", "deberta_v3", *list(MAKERS)[-7:]])
def test_a_half_precision_model_runs_in_fp32_as_its_copy_does_and_is_the_same_after(name, caplog):
    model = MAKERS[name]().to(torch.bfloat16)
    before = {key: (value, value.clone()) for key, value in model.named_parameters()}
    with caplog.at_level(logging.WARNING, "headprune"):
        found = small_output(model)
    assert not [record for record in caplog.records if record.name == "headprune"]
    assert found.dtype == torch.float32
    for key, value in model.named_parameters():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])
    expected = small_output(model.float())
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()  # pictures are rounded on the way in


def test_weights_are_back_after_a_failure():
    model = llama().to(torch.bfloat16)
    with pytest.raises(TypeError), in_fp32(model):
        model(input_ids="text")
    with pytest.raises(IndexError), in_fp32(model):
        model(input_ids=torch.tensor([[1000]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
