"""lm-evaluation-harness: with a stand-in for it, and really where it is installed."""

import json
import sys
import types

import pytest
from letter_tokenizer import letter_tokenizer
from tiny_models import llama

from headprune.errors import InvalidInput
from headprune.evaluation import LanguageModelHarness, compare

TASK = """task: tiny_letters
dataset_path: json
dataset_kwargs: {data_files: {test: "PLACE/data.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture
def stand_in(monkeypatch):
    """lm_eval as it answers: results by task, "metric,filter" -> value, and a sample for each document."""
    asked = []

    def simple_evaluate(model, tasks, **options):
        asked.append((model.kwargs["batch_size"], tasks, options))
        right = [1.0, 0.0, 1.0, 1.0] if model.kwargs["pretrained"].first else [0.0, 0.0, 1.0, 1.0]
        samples = [{"doc_id": number, "filter": "none", "acc": value} for number, value in enumerate(right)]
        results = {"alias": "letters", "acc,none": sum(right) / 4, "acc_stderr,none": 0.2, "word_perplexity,none": 9.5}
        return {"results": {"letters": results}, "samples": {"letters": samples[::-1]}}

    huggingface = types.SimpleNamespace(HFLM=lambda **kwargs: types.SimpleNamespace(kwargs=kwargs))
    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.SimpleNamespace(huggingface=huggingface))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    return asked


def test_results_become_metrics_and_samples_intervals(stand_in, tokenizer):
    dense, pruned = llama(), llama(seed=1)
    dense.first, pruned.first = True, False
    found = compare(dense, pruned, LanguageModelHarness(["letters"], tokenizer, batch=3, tokens=16, limit=4), repeats=1)
    assert found.dense.quality == {"letters acc": 0.75, "letters word_perplexity": 9.5}
    assert (found.headline, found.higher_is_better) == ("letters acc", True)
    assert set(found.differences) == {"letters acc"}
    assert found.differences["letters acc"].difference == -0.25
    batch, tasks, options = stand_in[0]
    assert (batch, tasks, options["limit"], options["log_samples"]) == (3, ["letters"], 4, True)


def test_without_it_the_error_says_what_to_install(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InvalidInput, match="pip install lm-eval"):
        LanguageModelHarness(["arc_easy"], tokenizer)
    with pytest.raises(InvalidInput, match="at least one task"):
        LanguageModelHarness([], tokenizer)


@pytest.mark.parametrize("raised", [ConnectionError("the Hub\ncannot be reached"), KeyError("nosuchtask"), ValueError("no split")])
def test_a_task_that_it_cannot_run_is_one_line(stand_in, monkeypatch, tokenizer, raised):
    def fails(**_):
        raise raised

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fails)
    with pytest.raises(InvalidInput, match=rf"cannot run nosuchtask: {type(raised).__name__}: .*HF_HUB_OFFLINE=0") as found:
        LanguageModelHarness(["nosuchtask"], tokenizer, tokens=16).examples(llama())
    assert "\n" not in str(found.value)


def test_what_headprune_itself_refuses_inside_is_not_put_on_the_task(stand_in, monkeypatch, tokenizer):
    def fails(**_):
        raise InvalidInput("gate has 3 heads")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fails)
    with pytest.raises(InvalidInput, match=r"^gate has 3 heads$"):
        LanguageModelHarness(["arc_easy"], tokenizer, tokens=16).examples(llama())


def test_a_task_of_ones_own_runs_in_the_real_harness(tmp_path, tokenizer):
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    documents = ({"question": f"letter {place} then", "choices": list("abc"), "answer": place % 3} for place in range(8))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("PLACE", str(tmp_path)))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    data = LanguageModelHarness(["tiny_letters"], tokenizer, tokens=16, task_manager=manager)
    found = compare(llama(), llama(seed=1), data, repeats=1)
    assert found.headline == "tiny_letters acc"
    assert found.differences["tiny_letters acc"].examples == 8
    change = found.pruned.quality["tiny_letters acc"] - found.dense.quality["tiny_letters acc"]
    assert found.differences["tiny_letters acc"].difference == pytest.approx(change)
