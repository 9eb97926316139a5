"""The comparison of one-shot methods: its rows, its table, and what each published form does."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quality import published, torch_pruning_heads
from quality.all_pairs import AllPairs
from quality.compare import measure
from quality.methods import WEIGHTS, Refused, Setting, even_plan, methods
from quality.recovery_table import joined, table
from quality.rows import Rows
from quality.summary import write_summary
from spent import Spent
from tiny_models import llama, tokens

import headprune as hp
from headprune.models import attention_sites


@pytest.fixture
def setting():
    model = llama()
    batches = [{"input_ids": tokens(4, 12, seed)} for seed in range(3)]
    task = SimpleNamespace(
        calibration=batches,
        loss=lambda model, batch: model(**batch).logits.float().square().mean(dim=(1, 2)),
        forward=lambda model, batch: model(**batch, use_cache=False),
        readout=lambda model, batch: model(**batch, use_cache=False),
    )
    return Setting("stdlib-lm", model, task, seed=0)


def row(method, heads, seed, of_dense, **more):
    return {
        "model": "minilm", "method": method, "heads": heads, "seed": seed, "settings": {}, "of_dense": of_dense, "kept": [3, 3],
        "cpu_seconds": {"scoring": 1.0}, "peak_mb": 10.0, **more,
    }  # fmt: skip


def dense(higher_is_better):
    return {
        "model": "minilm", "method": "dense", "heads": 0.0, "seed": 0, "settings": {}, "task": "some task", "headline": "metric",
        "higher_is_better": higher_is_better, "kept": [6, 6], "quality": {"metric": 0.5},
    }  # fmt: skip


def test_rows_are_there_again_after_a_run_that_was_cut_off(tmp_path):
    wanted = {"model": "minilm", "method": "fisher", "heads": 0.5, "seed": 1, "settings": {"score": "fisher"}}
    rows = Rows(tmp_path / "rows.json", {})
    assert not rows.has(wanted)
    rows.add(wanted | {"of_dense": 0.9})
    again = Rows(tmp_path / "rows.json", {})
    assert again.has(wanted)
    assert not again.has(wanted | {"seed": 2})
    assert not again.has(wanted | {"settings": {"score": "another"}})
    assert not again.has(wanted, again=["fisher"])
    again.add(wanted | {"of_dense": 0.8})
    assert again.has(wanted, again=["fisher"])


@pytest.mark.parametrize(("higher_is_better", "first"), [(True, "fisher"), (False, "ours")])
def test_the_table_names_the_first_and_hides_no_row(tmp_path, higher_is_better, first):
    rows = [dense(higher_is_better)]
    rows += [row("fisher", 0.5, seed, value) for seed, value in enumerate((0.9, 1.0, 0.8))]
    rows += [row("ours", 0.5, seed, value) for seed, value in enumerate((0.8, 0.8, 0.8))]
    rows += [row("torch-pruning", 0.5, 0, 0, refused="it is not installed"), row("wanda-sp", 0.5, 0, 0.7, kept=[3, 4])]
    if not higher_is_better:
        rows = [one for one in rows if one["method"] != "wanda-sp"]
    text = write_summary(rows, tmp_path / "rows.json")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert f"**{'0.900' if first == 'fisher' else '0.800'}**" in lines["Fisher" if first == "fisher" else "ours"]
    assert "± 0.100" in lines["Fisher"]
    assert text.count("**") == 4  # the model's name and the first
    assert "Torch-Pruning: it is not installed" in text
    if higher_is_better:
        assert "[keeps 7 of 6]" in lines["Wanda-sp"]


@pytest.mark.parametrize("granularity", ["query_head", "kv_group"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.65])
def test_an_even_plan_takes_the_lowest_of_every_layer(setting, granularity, fraction):
    scores = hp.score(setting.model, criterion="magnitude_l2")
    keep = even_plan(granularity)(setting, scores, fraction).keep
    counts = [len(heads) for heads in keep.values()]
    shapes = list(scores.shapes.values())
    units = sum(shape.head_map.query_heads if granularity == "query_head" else shape.head_map.kv_heads for shape in shapes)
    size = sum(shape.head_map.query_heads for shape in shapes) // units
    assert sum(counts) == size * (units - int(fraction * units))
    assert max(counts) - min(counts) <= size
    if granularity == "query_head":
        for name, heads in keep.items():
            gone = [head for head in range(len(scores[name])) if head not in heads]
            assert max(scores[name][gone], default=torch.tensor(0)) <= min(scores[name][list(heads)])


def test_flap_keeps_the_mean_of_what_the_first_layer_gives(setting):
    observed = setting.observe(frozenset({hp.Need.GRAM})).observed
    planned = published.fluctuating(setting, observed, 0.5)
    pruned = published.with_mean_in_bias(setting, observed, planned, llama())

    def mean_of_first(model):
        given = []
        site = attention_sites(model)[0]
        handle = site.output.module.register_forward_hook(lambda module, args, output: given.append(output.flatten(0, 1)))
        with torch.no_grad():
            for batch in setting.task.calibration:
                model(**batch)
        handle.remove()
        return torch.cat(given).mean(dim=0)

    assert len(planned.keep[attention_sites(setting.model)[0].name]) < 8
    assert torch.allclose(mean_of_first(pruned), mean_of_first(setting.model), atol=1e-5)


@pytest.mark.parametrize("name", ["random", "magnitude", "michel", "fisher", "wanda-sp", "kwon", "flap", "fisher+ours", "ours"])
def test_every_method_leaves_the_dense_model_as_it_was_and_gives_one_with_its_plan(setting, name):
    method, before = methods()[name], {k: v.clone() for k, v in setting.model.state_dict().items()}
    scored = method.score(setting, setting.observe(method.needs("stdlib-lm")).observed)
    planned = method.plan(setting, scored, 0.5)
    pruned = method.cut(setting, scored, planned, llama())
    assert {site.name: site.head_map.query_heads for site in attention_sites(pruned)} == {
        name: len(heads) for name, heads in planned.keep.items()
    }
    assert sum(len(heads) for heads in planned.keep.values()) == sum(s.head_map.query_heads for s in attention_sites(pruned))
    after = setting.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_methods_with_the_same_needs_share_a_pass_and_each_counts_it(setting):
    first, again = (setting.observe(methods()[name].needs("stdlib-lm")) for name in ("michel", "kwon"))
    assert first is again
    assert setting.observe(methods()["flap"].needs("stdlib-lm")) is not first
    fast = replace(methods()["fisher"], cut=lambda setting, scored, planned, model: model)
    setting.passes[frozenset({hp.Need.GATE_GRADIENT})] = replace(first, spent=Spent(seconds=1000.0, cpu_seconds=2000.0))
    task = SimpleNamespace(**vars(setting.task), headline="loss", evaluate=lambda model: {"loss": 2.0})
    (row,) = measure(fast, replace(setting, task=task), [0.5], {"quality": {"loss": 4.0}})
    assert 1000 < row["seconds"]["scoring"] < 1100
    assert 2000 < row["cpu_seconds"]["scoring"] < 2100
    assert row["of_dense"] == 0.5


def test_random_heads_differ_between_seeds(setting):
    observed = setting.observe(WEIGHTS).observed
    one, other = (methods()["random"].score(Setting("stdlib-lm", setting.model, setting.task, seed), observed) for seed in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fraction", [0.5, 0.65])
def test_torch_pruning_cuts_the_heads_that_its_row_names(setting, fraction):
    pytest.importorskip("torch_pruning")
    scored = torch_pruning_heads.weights_with_gradients(setting)
    planned = torch_pruning_heads.cut_by_torch_pruning(setting, scored, fraction)
    total = sum(site.head_map.query_heads for site in attention_sites(setting.model))
    assert sum(len(heads) for heads in planned.keep.values()) == total - int(fraction * total)
    batch = setting.task.calibration[0]
    with torch.no_grad():
        found = planned.model(**batch).logits
        with hp.gated(setting.model, planned.keep):
            expected = setting.model(**batch).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_without_torch_pruning_the_row_says_so(setting, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(Refused, match="pip install torch-pruning"):
        torch_pruning_heads.weights_with_gradients(setting)


def test_recoveries_are_joined_over_seeds_and_a_later_row_counts(tmp_path):
    def row(seed, way, ratio):
        return {"model": "minilm", "seed": seed, "heads": 0.5, "way": way, "ratio": ratio}

    files = [tmp_path / "first.json", tmp_path / "second.json"]
    files[0].write_text(json.dumps([row(0, "dense", 1.0), row(0, "none", 0.8), row(0, "full", 0.5)]))
    files[1].write_text(json.dumps([row(0, "full", 0.9), row(1, "full", 1.0) | {"ratio on more data": 0.7}]))
    lines = table(joined(files)).splitlines()
    assert lines[2] == "| heads gone | cut only | all weights |"
    assert lines[4] == "| 50% | 0.800 | 0.950 ± 0.071 (2) |"
    assert lines[6].startswith("**minilm**, quality over that of the dense model, on all its test data")
    assert lines[8:] == ["| heads gone | all weights |", "| --- | ---: |", "| 50% | 0.700 |"]


def test_all_test_pairs_are_ranked_within_their_own_pool():
    """The second pool's documents are nearer to every sentence than those of the first."""
    task = object.__new__(AllPairs)
    task.test = [SimpleNamespace(query="", document="")] * 1001
    nearness = torch.cat([torch.full((501,), 0.5), torch.full((500,), 0.9)])
    documents = torch.stack([nearness, (1 - nearness.square()).sqrt()], dim=1)
    task.embed_all = lambda model, texts, progress: torch.cat([torch.tensor([[1.0, 0.0]]).expand(1001, 2), documents])
    found = task.examples(None)["mrr"]
    assert found.rows.shape == (1001, 1)
    assert (found.rows == 1).all()
