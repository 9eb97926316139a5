"""Your own pairs of texts as a task."""

import csv
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from tiny_models import bert, llama
from transformers import BertConfig, BertForSequenceClassification, BertModel

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation import Retrieval
from headprune.evaluation.retrieval import embed, pooled, ranks
from headprune.evaluation.tasks import build_task


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        for number in range(40):
            letter = "abcdefghijklmnopqrstuvwxyz"[number % 26]
            writer.writerow([f"{letter} ask" * (1 + number % 3), f"{letter} say" * (1 + number // 8)])
    return path


def build(pairs, **options):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = "[UNK]"
    options = {"query": "question", "document": "answer", "batch": 8, **options}
    return build_task("retrieval", tokenizer, calibration=str(pairs), **options)


def test_pairs_are_calibration_but_for_a_tenth(pairs):
    task = build(pairs)
    assert len(task.test) == 4
    assert len(task.training_pairs) == 36
    assert not set(task.test) & set(task.training_pairs)
    assert sum(len(batch["input_ids"]) for batch in task.calibration) == 72
    task.check_model(bert())
    assert 0 < task.evaluate(bert())["mrr"] <= 1
    assert task.loss(bert(), task.calibration[0]).shape == (8,)
    found = hp.evaluate(bert(), task, repeats=1)
    assert (found.test_examples, found.calibration_examples) == (4, 36)
    assert found.__rich__().title == "4 test examples, 36 for calibration"


def test_each_text_of_a_pair_is_a_sample_where_heads_are_scored(pairs):
    task = build(pairs)
    found = hp.observe(bert(), task.calibration, {"gate_gradient"}, loss_fn=task.loss)
    assert {observed.gate_gradient.shape for observed in found.values()} == {(72, 4)}


@pytest.mark.parametrize("pooling", ["mean", "cls", "first", "last"])
def test_pooling_is_of_each_texts_own_tokens(pairs, pooling):
    states = torch.randn(3, 5, 4, dtype=torch.float64)
    for mask in (torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1]] * 3)):
        for row, found in enumerate(pooled(states, mask, pooling)):
            own = states[row, mask[row].bool()]
            assert torch.allclose(found, {"mean": own.mean(dim=0), "last": own[-1]}.get(pooling, own[0]))
    task = build(pairs, pooling=pooling)
    assert task.outputs(bert()).shape == (4, 32)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_large_states_in_half_precision_do_not_overflow(pooling):
    """Some tokens of decoders reach thousands."""
    mask = torch.ones(2, 200, dtype=torch.long)
    states = torch.full((2, 200, 512), 4000.0)
    wide = lambda **_: SimpleNamespace(last_hidden_state=states.half())  # noqa: E731
    with mock.patch("headprune.evaluation.retrieval.placed", lambda _model, batch: batch):
        found = embed(wide, {"attention_mask": mask}, pooling)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2, 512), 512**-0.5))


def test_a_model_that_gives_nothing_finite_finds_nothing():
    """NaN is nearer than nothing: such documents passed for the first."""
    queries, documents = torch.eye(4), torch.eye(4)
    queries[1] = documents[3] = torch.nan
    assert ranks(queries, documents, torch.arange(4)).tolist() == [1, 4, 1, 4]


def test_a_document_of_several_queries_is_one_document_on_one_side(tmp_path):
    """Rounding, which differs between batches, told which of the copies came first."""
    path = tmp_path / "pairs.csv"
    letters = random.Random(0)
    answers = ["".join(letters.choices("abcdefghij ", k=20 + 3 * number)) for number in range(20)]
    rows = [f"{answer},{answer}" for answer in answers for _ in range(5)]
    path.write_text("\n".join(["question,answer", *rows]))
    task = build(path, batch=32)
    assert len(task.test) == 10
    assert not {pair.document for pair in task.test} & {pair.document for pair in task.training_pairs}
    assert build(path, batch=32, test_pairs=7).evaluate(bert()) == {"mrr": 1.0, "accuracy@1": 1.0}
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = "[UNK]"
    of_all = Retrieval(answers * 5, answers * 5, tokenizer, batch=32)
    assert of_all.evaluate(bert()) == {"mrr": 1.0, "accuracy@1": 1.0, "accuracy@10": 1.0}


def test_an_unknown_pooling_or_column_is_told(pairs):
    with pytest.raises(InvalidInput, match="unknown pooling 'max'"):
        build(pairs, pooling="max")
    with pytest.raises(InvalidInput, match=r"task retrieval puts .* the tokenizer has no padding token\. Set one"):
        build_task("retrieval", letter_tokenizer(), calibration=str(pairs), query="question", document="answer")
    with pytest.raises(InvalidInput, match="row 1: no 'text', only question, answer"):
        build(pairs, query="text")


def test_batches_without_wrong_documents_are_refused(pairs):
    for size in (0, 1):
        with pytest.raises(InvalidInput, match=f"batch={size}; expected at least 2 pairs a batch"):
            build(pairs, batch=size)


def test_models_without_states_of_tokens_and_texts_that_are_too_long_are_told(pairs):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 61}
    classifier = BertForSequenceClassification(BertConfig(**shape))
    task = build(pairs)
    with pytest.raises(InvalidInput, match=r"a BertForSequenceClassification gives no states .* AutoModel\.from_pretrained"):
        task.loss(classifier, task.calibration[0])
    with pytest.raises(InvalidInput, match=r"LlamaForCausalLM is a language model\. Take what is under its head"):
        task.check_model(llama())
    with pytest.raises(InvalidInput, match="a text has 25 tokens, and BertModel takes at most 9; give max_tokens=9"):
        task.check_model(BertModel(BertConfig(**shape, max_position_embeddings=9)))
    build(pairs, max_tokens=9).check_model(BertModel(BertConfig(**shape, max_position_embeddings=9)))


def test_heads_are_scored_on_pairs_each_text_a_sample(pairs):
    model, task = bert(), build(pairs)
    found = hp.observe(model, task.calibration, {"gate_gradient"}, loss_fn=task.loss)
    assert {len(found[site.name].gate_gradient) for site in hp.attention_sites(model)} == {72}
