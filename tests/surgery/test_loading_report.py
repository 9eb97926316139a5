"""What is said of a folder that lacks weights, which transformers fills with random ones."""

import logging

import pytest
from safetensors.torch import load_file, save_file
from tiny_decoders import decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, llama
from transformers import BertForMaskedLM

from headprune.errors import CorruptCheckpoint
from headprune.surgery import load

MODELS = {
    "bert": bert,
    "gpt2": lambda: decoder("gpt2"),
    "llama": llama,
    "t5": SEQ2SEQ["t5"].make,
    "tied": lambda: llama(tie_word_embeddings=True),
    "vit": VISION["vit"].make,
    "wavlm": ENCODERS["wavlm"].make,
}


def without(folder, model, part):
    """The folder of a stock model whose weights lack all that `part` names."""
    MODELS[model]().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    left = {name: value for name, value in weights.items() if part not in name}
    assert len(left) < len(weights)
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("model", "part", "named"),
    [
        ("bert", "encoder.layer.1.", r"encoder\.layer\.1\..* and 13 more"),
        ("bert", "word_embeddings", r"embeddings\.word_embeddings\.weight"),
        ("gpt2", "h.1.attn", r"transformer\.h\.1\.attn\."),
        ("llama", "layers.0.mlp.up_proj", r"model\.layers\.0\.mlp\.up_proj\.weight"),
        ("t5", "decoder.block.1.", r"decoder\.block\.1\."),
        ("tied", "embed_tokens", r"model\.embed_tokens\.weight"),
        ("vit", "encoder.layer.0.output", r"vit\..*0\."),
    ],
)
def test_a_stock_folder_without_weights_of_a_layer_or_an_embedding_is_refused(tmp_path, model, part, named):
    with pytest.raises(CorruptCheckpoint, match=f"{tmp_path} lacks weights that its config promises: {named}"):
        load(without(tmp_path, model, part))


@pytest.mark.parametrize(
    ("model", "part"), [("bert", "pooler"), ("llama", "lm_head"), ("vit", "classifier"), ("wavlm", "masked_spec_embed")]
)
def test_what_a_stock_folder_may_lack_is_warned_of(tmp_path, caplog, model, part):
    folder = without(tmp_path, model, part)
    with caplog.at_level(logging.WARNING, "headprune"):
        load(folder)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "headprune"]
    assert said.startswith(f"{folder} lacks ")
    assert part in said


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_said_of_a_folder_that_lacks_nothing(tmp_path, caplog, model):
    MODELS[model]().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "headprune"):
        load(tmp_path)
    assert not [record for record in caplog.records if record.name == "headprune"]


def test_nothing_is_said_of_a_pooler_that_comes_with_the_base_model_alone(tmp_path, caplog):
    """A language model has none in its folder."""
    BertForMaskedLM(bert().config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "headprune"):
        assert type(load(tmp_path, base=True)).__name__ == "BertModel"
    assert not [record for record in caplog.records if record.name == "headprune"]
