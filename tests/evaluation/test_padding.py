"""What is said of texts that cannot be made equally long, or whose end the model would not find."""

import json

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 61}
ANSWERS = {"text": ["a"], "answer_start": [0]}


def padding_tokenizer():
    found = letter_tokenizer()
    found.pad_token = "</s>"
    return found


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["abc"[: number % 3 + 1] for number in range(20)]
    texts = ("text", "query", "document", "source", "target", "question", "context")
    lists = {"answers": ANSWERS, "tokens": ["a"], "tags": ["O"]}
    path.write_text("\n".join(json.dumps({**dict.fromkeys(texts, word), "label": len(word) % 2, **lists}) for word in words))
    return path


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "retrieval", "text-to-text", "question-answering"])
def test_a_tokenizer_without_padding_is_named(task, rows):
    with pytest.raises(InvalidInput, match=rf"task {task} puts .* no padding token\. Set one"):
        build_task(task, letter_tokenizer(), calibration=str(rows)).check_model(classifier(None))


def classifier(padding: int | None) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, pad_token_id=padding)).eval()


@pytest.mark.parametrize("padding", [None, 0])
def test_a_decoder_that_would_read_padding_for_the_last_token_is_refused(padding, rows):
    task = build_task("text-classification", padding_tokenizer(), calibration=str(rows))
    with pytest.raises(InvalidInput, match=rf"config\.pad_token_id is {padding}, .* Set model\.config\.pad_token_id = 1"):
        task.check_model(classifier(padding))


def test_a_decoder_that_knows_its_padding_reads_each_text_as_alone(rows):
    task, model = build_task("text-classification", padding_tokenizer(), calibration=str(rows)), classifier(1)
    task.check_model(model)
    batch = task.calibration[0]
    alone = [model(input_ids=row[None, mask.bool()]).logits for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert torch.allclose(task.forward(model, batch).logits, torch.cat(alone), atol=1e-6)
    build_task("text-classification", padding_tokenizer(), calibration=str(rows), batch=1).check_model(classifier(None))
