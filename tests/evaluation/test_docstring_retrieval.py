import pytest
import torch
from tiny_models import bert, llama

from headprune.errors import InvalidInput
from headprune.evaluation import Comparison, compare
from headprune.evaluation.cost import attention_flops
from headprune.evaluation.latency import measure_latency
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.docstrings import docstring_pairs, is_test_file
from headprune.models import attention_sites
from headprune.surgery import cut


class WordTokenizer:
    """Hashes words to tokens: enough for a random model."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[1 + sum(map(ord, word)) % 60 for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture(scope="module")
def task():
    return build_task("docstring-retrieval", WordTokenizer(), calibration_pairs=40, test_pairs=30, batch=8, max_tokens=24)


def test_calibration_and_test_share_no_file_and_no_text():
    calibration, test = docstring_pairs()
    assert len(calibration) > 200
    assert len(test) > 200
    texts = [text for pair in (*calibration, *test) for text in (pair.query, pair.document)]
    assert len(texts) == len(set(texts))
    assert is_test_file("json/decoder.py") == is_test_file("json/decoder.py")


def test_validation_splits_the_calibration_pairs_once_more():
    calibration, test = docstring_pairs()
    left, validation = docstring_pairs(validation=True)
    assert len(left) > 100
    assert len(validation) > 100
    assert {*left, *validation} == set(calibration)
    assert not {*left, *validation} & set(test)


def test_the_task_is_the_same_every_time(task):
    again = build_task("docstring-retrieval", WordTokenizer(), calibration_pairs=40, test_pairs=30, batch=8, max_tokens=24)
    assert again.digest == task.digest
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again.calibration, task.calibration))


def test_another_seed_draws_other_calibration_pairs_and_the_same_test_pairs(task):
    options = {"calibration_pairs": 40, "test_pairs": 30, "batch": 8, "max_tokens": 24}
    other = build_task("docstring-retrieval", WordTokenizer(), seed=1, **options)
    assert other.test == task.test
    drawn, same = ({tuple(row) for batch in one.calibration for row in batch["input_ids"].tolist()} for one in (other, task))
    assert len(drawn - same) > len(drawn) / 2


def test_retrieval_metrics_against_a_plain_ranking(task):
    model = bert()
    found = task.evaluate(model)
    queries = torch.cat([task.embed(model, task.encoded([pair.query])) for pair in task.test]).detach()
    documents = torch.cat([task.embed(model, task.encoded([pair.document])) for pair in task.test]).detach()
    ranks = []
    for index, query in enumerate(queries):
        order = sorted(range(len(documents)), key=lambda other: -float(query @ documents[other]))
        ranks.append(1 + order.index(index))
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), abs=1e-3)
    assert found["accuracy@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks), abs=1e-3)


def test_the_loss_is_cross_entropy_over_the_documents_of_the_batch(task):
    model, batch = bert(), task.calibration[0]
    losses = task.loss(model, batch)
    embedded = task.embed(model, batch)
    half = len(embedded) // 2
    expected = [-torch.log_softmax(20 * embedded[row] @ embedded[half:].T, 0)[row] for row in range(half)]
    assert torch.allclose(losses, torch.stack(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "tokenizer", "options", "names"),
    [
        ("docstring-retrieva", WordTokenizer(), {}, "Did you mean 'docstring-retrieval'"),
        ("docstring-retrieval", None, {}, "needs a tokenizer"),
        ("docstring-retrieval", WordTokenizer(), {"pairs": 3}, "pairs"),
        ("docstring-retrieval", WordTokenizer(), {"calibration_pairs": 0}, "calibration set .* is empty"),
    ],
)
def test_a_bad_task_is_named(name, tokenizer, options, names):
    with pytest.raises(InvalidInput, match=names):
        build_task(name, tokenizer, **options)


def test_a_language_model_is_refused(task):
    task.check_model(bert())
    with pytest.raises(InvalidInput, match="needs an embedder; LlamaForCausalLM"):
        task.check_model(llama())


def test_attention_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = bert()
    model.set_attn_implementation("eager")
    whole = model.encoder.layer[0].attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole(torch.randn(1, 10, 32))
    assert attention_flops(attention_sites(model)[:1], 10) == counter.get_total_flops()


def test_comparing_measures_both_models_and_their_ratio(task):
    dense, pruned = bert(), bert()
    cut(pruned, {"encoder.layer.0.attention": [0, 1], "encoder.layer.1.attention": [3]})
    found = compare(dense, pruned, task, repeats=2)
    assert isinstance(found, Comparison)
    assert found.ratio("attention_flops") == pytest.approx(3 / 8)
    assert found.dense.parameters - found.pruned.parameters == 5 * (4 * 8 * 32 + 3 * 8)
    assert found.pruned.quality.keys() == {"mrr", "accuracy@1"}
    assert found.dense.peak_activation_bytes > 0
    assert found.to_json()["pruned"]["parameters"] == found.pruned.parameters


def test_latency_has_one_entry_per_model():
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    found = measure_latency({"a": bert(), "b": bert()}, inputs, repeats=3, warmup=1)
    assert list(found) == ["a", "b"]
    assert all(0 < latency.p50_ms <= latency.p95_ms for latency in found.values())


def test_a_search_compares_models_by_their_embeddings(task):
    model, batch = bert().eval(), task.calibration[0]
    with torch.no_grad():
        read, states = task.readout(model, batch), model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
    assert torch.allclose(read, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)
