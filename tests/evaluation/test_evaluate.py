"""Quality and cost of one model and of two, on whatever data."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from tiny_decoders import decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, llama, tokens

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation import Comparison, Evaluation, Perplexity, compare, evaluate
from headprune.evaluation.cost import attention_flops, model_flops
from headprune.evaluation.data import EvaluationData
from headprune.evaluation.machine import machine_name
from headprune.evaluation.metric import Metric, mean
from headprune.models import attention_sites
from headprune.surgery import cut

INPUTS = {"input_ids": tokens(2, 10)}
TEXT = "to be or not to be that is the question " * 8


class Letters:
    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


def pruned():
    model = llama()
    cut(model, {"model.layers.0.self_attn": [0, 5], "model.layers.1.self_attn": [1, 2, 3]})
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "headprune"])
def test_model_flops_are_those_of_the_matrix_products(implementation):
    model = llama(attn_implementation=implementation)
    dense_layers = 10 * 2 * (2 * 3 * 32 * 48 + 32 * 61)
    assert model_flops(model, INPUTS) == attention_flops(attention_sites(model), 10) + dense_layers
    ragged = pruned()
    assert model_flops(ragged, INPUTS) == attention_flops(attention_sites(ragged), 10) + dense_layers


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_model_flops_hold_the_experts_however_they_are_multiplied(implementation):
    model = decoder("qwen3_moe", num_experts=8, num_experts_per_tok=2)
    model.set_experts_implementation(implementation)
    others = 10 * 2 * (2 * 8 * 32 + 32 * 61)  # routers and the head
    experts = 10 * 2 * (2 * 2 * 3 * 32 * 16)
    assert model_flops(model, INPUTS) == attention_flops(attention_sites(model), 10) + others + experts


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "albert", "vit", "swin"])
def test_attention_flops_are_those_of_the_tokens_that_each_attention_runs(family):
    """What torch counts of the whole pass falls by as much when heads go."""
    made = {**ENCODERS, **SEQ2SEQ, **VISION}[family]
    model, batch = made.make("eager"), made.batch("left")

    def flops():
        return evaluate(model, lambda model: 0.0, inputs=batch, repeats=1).attention_flops, model_flops(model, batch)

    attention, whole = flops()
    cut(model, {site.name: [0] for site in attention_sites(model)})
    left, whole_left = flops()
    assert attention == 4 * left
    assert attention - left == whole - whole_left


def test_positions_that_go_through_the_key_projection_too_are_no_keys():
    """And torch's counter has no gradient of a view of them."""
    made = ENCODERS["deberta_v3_shared_keys"]
    model = made.make()
    found = evaluate(model, lambda model: 0.0, inputs=made.batch("left"), repeats=1)
    assert found.attention_flops == attention_flops(attention_sites(model), 9)
    assert found.model_flops > found.attention_flops
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_keeps_no_cache_has_no_bytes_of_it():
    found = compare(bert(), bert(), lambda model: 1.0, inputs=INPUTS, repeats=1)
    assert found.dense.kv_cache_bytes_per_token is None
    assert found.shown_ratio("kv_cache_bytes_per_token") == "–"
    assert not any("key/value" in row[0] for row in found.rows())
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_text_gives_quality_intervals_and_all_costs():
    found = compare(llama(), pruned(), Perplexity(TEXT, Letters(), window=32), repeats=2)
    assert set(found.differences) == {"perplexity", "accuracy"}
    interval = found.differences["perplexity"]
    assert interval.difference == pytest.approx(found.pruned.quality["perplexity"] - found.dense.quality["perplexity"])
    assert interval.low <= interval.difference <= interval.high
    assert found.pruned.weight_bytes < found.dense.weight_bytes
    assert found.pruned.model_flops < found.dense.model_flops
    assert found.pruned.generation_ms_per_token > 0
    assert found.dense.energy_joules is None
    assert found.columns()[-1] == "difference [95% interval]"
    rows = {row[0]: row for row in found.rows()}
    assert rows["perplexity (lower is better)"][4] == str(interval)
    assert "energy, J/sequence" not in rows
    assert all(len(row) == 5 for row in rows.values())


def test_a_comparison_is_read_back_and_an_older_one_too():
    found = compare(llama(), pruned(), Perplexity(TEXT, Letters(), window=32), repeats=1)
    written = json.loads(json.dumps(found.to_json()))
    assert Comparison.from_json(written) == found
    del written["differences"]
    for name in ("weight_bytes", "model_flops", "generation_ms_per_token", "energy_joules"):
        del written["dense"][name], written["pruned"][name]
    older = Comparison.from_json(written)
    assert older.columns() == ("", "dense", "pruned", "pruned / dense")
    assert all(len(row) == 4 for row in older.rows())


def test_any_function_of_the_model_is_a_metric():
    def norm(model):
        return model(**INPUTS).last_hidden_state.norm()

    found = hp.evaluate(bert(), norm, inputs=INPUTS, repeats=1)
    with torch.no_grad():
        assert found.quality == {"norm": pytest.approx(float(norm(bert())))}
    by_example = compare(
        bert(),
        bert(seed=1),
        lambda model: {"first": model(**INPUTS).last_hidden_state[:, 0, 0], "two": 2.0},
        inputs=INPUTS,
        repeats=1,
    )
    assert by_example.headline == "first"
    assert set(by_example.differences) == {"first"}  # a single number has no interval


def test_what_cannot_be_evaluated_on_is_refused():
    with pytest.raises(InvalidInput, match="cannot evaluate on list"):
        evaluate(bert(), [INPUTS])
    with pytest.raises(InvalidInput, match="needs inputs="):
        evaluate(bert(), lambda model: 1.0)
    with pytest.raises(InvalidInput, match="gave nothing"):
        evaluate(bert(), lambda model: {}, inputs=INPUTS)


def test_a_model_is_left_in_the_mode_it_came_in():
    model = llama().train()
    evaluate(model, lambda model: 1.0, inputs=INPUTS, repeats=1)
    assert model.training


def test_ratios_are_pruned_over_dense():
    dense = Evaluation({"accuracy": 0.8}, 1000, 50, 10, 64, 20.0, 21.0, 4.0, 512, energy_joules=2.0)
    pruned = Evaluation({"accuracy": 0.6}, 750, 20, 10, 16, 5.0, 6.0, 16.0, 256)
    found = Comparison("task", "accuracy", dense, pruned)
    names = ("accuracy", "parameters", "attention_flops", "kv_cache_bytes_per_token", "latency_p50_ms", "throughput")
    assert [found.ratio(name) for name in names] == pytest.approx([0.75, 0.75, 0.4, 0.25, 0.25, 4.0])
    assert all(math.isnan(found.ratio(name)) for name in ("energy_joules", "model_flops", "f1"))  # not measured, of one or of both


def test_times_go_with_the_machine_that_they_are_of():
    found = compare(llama(), pruned(), lambda model: 1.0, inputs=INPUTS, repeats=1)
    assert found.dense.machine == found.pruned.machine == found.__rich__().caption == machine_name(torch.device("cpu"))
    assert found.dense.machine == found.dense.__rich__().caption == found.to_json()["dense"]["machine"]
    older = found.to_json()
    del older["dense"]["machine"], older["pruned"]["machine"]
    assert Comparison.from_json(older).dense.machine is None


def test_a_quality_of_0_has_no_ratio():
    found = compare(llama(), pruned(), lambda model: 0.0, inputs=INPUTS, repeats=1)
    (row,) = (row for row in found.rows() if row[0] in found.dense.quality or row[0].endswith("is better)"))
    assert row[3] == "–"
    assert not any("nan" in cell for row in found.rows() for cell in row)


def test_how_much_quality_rests_on_is_told_and_too_little_warned_of_once(caplog):
    few, many = (Perplexity(TEXT * times, Letters(), window=32) for times in (1, 8))
    found = compare(llama(), pruned(), few, repeats=1)
    evaluate(llama(), few, repeats=1)
    assert found.dense.test_examples == found.pruned.test_examples == 10
    assert found.dense.calibration_examples is None
    assert found.__rich__().title == "perplexity, one run, 10 test examples"
    (record,) = caplog.records
    assert "measured on 10 test examples; with fewer than 50, single ones decide. Give more: a longer text" in record.message
    assert evaluate(llama(), many, repeats=1).test_examples == 80
    total = evaluate(bert(), lambda model: 1.0, inputs=INPUTS, repeats=1)
    assert total.test_examples is None
    assert total.__rich__().title is None
    assert len(caplog.records) == 1
    one = Perplexity("abcdefgh", Letters(), window=32)
    assert evaluate(llama(), one, repeats=1).__rich__().title == "1 test example"
    assert "measured on 1 test example;" in caplog.records[-1].message


@dataclass
class Own(EvaluationData):
    """As a dataclass that compares it has no hash."""

    rows: int
    name, headline, higher_is_better = "own", "x", True

    def examples(self, model, progress=None):
        return {"x": Metric(torch.ones(self.rows), mean)}

    def latency_inputs(self):
        return INPUTS


def test_data_of_ones_own_may_be_a_dataclass(caplog):
    data = Own(3)
    assert all(evaluate(bert(), data, repeats=1).test_examples == 3 for _ in range(2))
    assert len(caplog.records) == 1
