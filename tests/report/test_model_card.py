"""The card of a pruned model."""

import json

import pytest
import transformers
from huggingface_hub import ModelCard
from reported_run import MACHINE, write_run

from headprune.errors import InvalidInput
from headprune.files import write_text
from headprune.report.model_card import write_card
from headprune.surgery.remote_code import auto_map


def card_of(folder, recipe: str = "model: llama\ntask: {name: made-up}\n") -> ModelCard:
    write_run(folder)
    write_text(folder / "recipe.yaml", recipe)
    (folder / "model").mkdir(exist_ok=True)
    return ModelCard.load(write_card(folder))


def test_a_card_tells_what_is_gone_and_what_was_measured(tmp_path):
    card = card_of(tmp_path)
    assert card.data.library_name == "transformers"
    assert {"headprune", "pruned"} <= set(card.data.tags)
    assert card.data.base_model is None
    for line in (
        "`llama` without 8 of its 16 query heads (50%): scored by fisher, cut out of the weights, outputs re-solved on "
        "calibration data.",
        "| perplexity (lower is better) | 10.0000 | 12.0000 | 1.200 |",
        f"Measured on {MACHINE}.",
        "| attention | query heads | of | key/value heads | of |",
    ):
        assert line in card.text.splitlines()
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| model.layers.")]
    assert len(rows) == 2
    assert sum(int(row[1]) for row in rows) == 8


def test_a_name_on_the_hub_is_the_base_model_whose_license_stays(tmp_path):
    base = tmp_path / "base"
    write_text(base / "README.md", "---\nlicense: apache-2.0\nlanguage: [en]\nmodel-index: []\n---\nA model.\n")
    write_text(base / "config.json", "{}")
    card = card_of(tmp_path / "run", f"model: {base}\ntask: {{name: made-up}}\nprune: {{compensate: false}}\n")
    assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", ["en"], None)
    assert "outputs re-solved" not in card.text
    (tmp_path / "other" / "recovered").mkdir(parents=True)
    card = card_of(tmp_path / "other", "model: owner/a-model@v1\ntask: {name: made-up}\n")
    assert card.data.base_model == "owner/a-model"
    assert (tmp_path / "other" / "recovered" / "README.md").is_file()
    assert not (tmp_path / "other" / "model" / "README.md").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("recover: {steps: 5}", ", distilled from the dense model."),
        (
            "recover: {steps: 5, quantise: int4}",
            ", distilled from the dense model, for weights that are rounded to int4 afterwards.",
        ),
        ("recover: {steps: 5, distil: false}", ", fine-tuned by the task's loss."),
        (
            "schedule: {name: iterative}\nrecover: {steps: 5}",
            ", distilled from the dense model, in the steps of the schedule iterative.",
        ),
    ],
)
def test_training_after_the_cut_is_told(tmp_path, section, said):
    assert f"calibration data{said}" in card_of(tmp_path, f"model: llama\ntask: {{name: made-up}}\n{section}\n").text


LOADED_BY = {
    "BertForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "BertModel": ("AutoModel", None),
    "RobertaForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ViTForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
    "WhisperForConditionalGeneration": ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    "Qwen2VLForConditionalGeneration": ("AutoModelForImageTextToText", "image-text-to-text"),
}


@pytest.mark.parametrize("saved", LOADED_BY)
def test_a_card_names_the_class_that_loads_the_model_and_what_it_is_for(saved, tmp_path):
    stock = getattr(transformers, saved)
    config = {"architectures": [saved], "auto_map": auto_map(stock.config_class(), stock)}
    write_text(tmp_path / "model" / "config.json", json.dumps(config))
    card = card_of(tmp_path)
    auto, task = LOADED_BY[saved]
    assert f'or, also without headprune, `{auto}.from_pretrained("FOLDER", trust_remote_code=True)`.' in card.text.splitlines()
    assert card.data.pipeline_tag == task


def test_the_card_of_an_embedder_is_one_of_sentence_transformers(tmp_path):
    write_text(tmp_path / "model" / "modules.json", "[]")
    card = card_of(tmp_path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert '`SentenceTransformer("FOLDER", trust_remote_code=True)`' in card.text


def test_a_card_that_cannot_be_read_gives_nothing(tmp_path):
    write_text(tmp_path / "base" / "README.md", "---\nlicense: [\n---\n")
    assert card_of(tmp_path / "run", f"model: {tmp_path / 'base'}\ntask: {{name: made-up}}\n").data.license is None


def test_a_run_without_a_plan_has_no_card(tmp_path):
    write_run(tmp_path)
    (tmp_path / "plan.json").unlink()
    (tmp_path / "model").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no plan\.json"):
        write_card(tmp_path)
