"""The comparison as a whole: one table, kept row by row."""

import json
import sys

import pytest
import torch
from small_states import SmallStates
from tiny_models import bert

import headprune as hp
from headprune.comparison import MethodRow, Refused, bench, comparison_method, method
from headprune.errors import InvalidInput
from headprune.evaluation.machine import machine_name
from headprune.evaluation.metric import Metric, mean

NAMES = ["heads", "unstructured", "semi-structured", "layers"]


class SmallRows(SmallStates):
    """With metrics of single examples, so that differences have intervals."""

    def examples(self, model, progress=None):
        return {"norm": Metric(self.outputs(model)[:, 0, :5].double().square().sum(dim=1), mean)}

    evaluate = hp.evaluation.EvaluationData.evaluate


def compare(folder=None, **options):
    settings = {"heads": 0.25, "methods": NAMES, "steps": 3, "lr": 1e-2, "trials": 0, "repeats": 1} | options
    return hp.compare_methods(bert(layers=4), SmallRows(), folder=folder, **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "folder"
    return folder, compare(folder)


def test_the_table_has_dense_first_and_what_each_method_removed(done):
    _, found = done
    assert [row.method for row in found.rows] == ["dense", "heads", "layers", "semi-structured", "unstructured"]
    assert found.heads == (16, 12)
    dense, heads = found.row("dense"), found.row("heads")
    assert dense.parameters - heads.parameters == found.removed
    assert dense.nonzero - found.row("unstructured").nonzero == found.removed
    assert heads.file_bytes < dense.file_bytes <= found.row("unstructured").file_bytes
    assert found.row("unstructured").compact_bytes < dense.file_bytes
    assert heads.flops_share < dense.flops_share == found.row("unstructured").flops_share == 1
    for row in found.rows:
        assert row.tuned_steps == 3
        assert row.tuned_loss < row.loss
        assert row.latency_share > 0
    assert heads.difference.examples == 4
    assert dense.difference is None
    assert dense.tuned_difference is not None


def test_it_is_shown_in_full(done):
    _, found = done
    text = found.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + len(found.rows)
    assert f"{found.row('heads').quality['norm'] / found.row('dense').quality['norm']:.3f}" in text
    assert "2:4 sparse matrix products" in text
    assert len(found.notes()) == len(found.rows) - 1
    assert f"Latency on {machine_name(torch.device('cpu'))}." in text


def test_a_finished_comparison_is_read_back_and_more_methods_join_it(done, monkeypatch):
    folder, found = done
    monkeypatch.setattr("headprune.comparison.bench.Bench.measured", pytest.fail)
    assert compare(folder) == found
    assert compare(folder, methods=["heads"]).rows == found.rows[:2]


def test_a_killed_comparison_goes_on_where_it_stopped(tmp_path, done, monkeypatch):
    measure, order = bench.Bench.measured, []

    def killed_at_the_third(self, method, progress):
        order.append(method.name)
        if len(order) == 3:
            raise KeyboardInterrupt
        return measure(self, method, progress)

    monkeypatch.setattr(bench.Bench, "measured", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "plan.json", "dense.json", "heads.json"}
    found = compare(tmp_path)
    assert order == ["dense", "heads", "layers", "layers", "semi-structured", "unstructured"]
    for row, other in zip(found.rows, done[1].rows, strict=True):
        assert (row.method, row.quality, row.loss, row.tuned_quality) == (
            other.method,
            other.quality,
            other.loss,
            other.tuned_quality,
        )


def test_a_killed_fine_tune_goes_on_with_the_same_zeros(tmp_path, monkeypatch):
    recover, seen = bench.recover, []

    def watched(*args, output_dir, **options):
        def killed_after_two(done, total):
            if output_dir.name == "unstructured":
                seen.append(done)
                if seen == [1, 2]:
                    raise KeyboardInterrupt

        return recover(*args, output_dir=output_dir, save_steps=1, **options | {"progress": killed_after_two})

    settings = {"methods": ["unstructured"], "steps": 4, "repeats": 0}
    whole = compare(**settings)
    monkeypatch.setattr(bench, "recover", watched)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, **settings)
    row, other = compare(tmp_path, **settings).row("unstructured"), whole.row("unstructured")
    assert seen in ([1, 2, 2, 3, 4], [1, 2, 3, 4])  # the checkpoint of the second step is only written behind it
    assert row.tuned_loss == pytest.approx(other.tuned_loss, rel=1e-5)
    assert not (tmp_path / "unstructured").exists()


def test_rounded_weights_are_fine_tuned_as_rounded():
    """The row after the fine-tune is of a model that is rounded, whose training knew of it; the sizes stay."""
    pytest.importorskip("torchao")
    row = compare(methods=["int4"], steps=12, repeats=0).row("int4")
    assert row.tuned_steps == 12
    assert row.tuned_loss < row.loss
    model = bert(layers=4)
    task, texts = SmallRows(), bench.Texts.of(SmallRows())
    hp.recover(model, texts.train, loss_fn=task.loss, steps=12, lr=1e-2, quantise="int4", dropout=False)
    hp.recovery.quantise(model, "int4")
    with torch.no_grad():
        expected = sum(float(task.loss(model, batch).mean()) for batch in texts.held_out) / len(texts.held_out)
    assert row.tuned_loss == pytest.approx(expected, rel=1e-5)


def test_a_refused_method_has_a_row_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(method, "_methods", dict(method._methods))

    @comparison_method("picky", label="picky", kind="sparsity", granularity="nothing", library="no-such-library")
    def picky(subject):
        raise Refused("it only takes squares")

    found = compare(tmp_path, methods=["picky"], steps=0, repeats=0)
    assert found.row("picky").refused == "it only takes squares"
    assert "no-such-library (not installed); it only takes squares" in found.to_markdown()
    assert not (tmp_path / "picky.json").exists()


def test_without_fine_tune_and_timing_their_columns_are_gone():
    found = compare(methods=["heads"], steps=0, repeats=0)
    assert found.rows[1].tuned_loss is None
    assert "latency" not in found.to_markdown()
    assert "after" not in found.to_markdown().split("\n- ")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["heds"]}, "Did you mean 'heads'"),
        ({"heads": 1.0}, "heads is 1.0; expected"),
        ({"heads": 0.0}, "above 0"),
        ({"heads": 0.01}, "removes no parameter"),
        ({"steps": -1}, "steps is -1; expected a whole number, 0 or more"),
        ({"lr": -1.0}, r"lr is -1\.0"),
        ({"criterion": "fihser"}, "Did you mean 'fisher'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(InvalidInput, match=message):
        compare(tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()


def test_a_folder_of_another_comparison_is_refused(done, tmp_path):
    folder, _ = done
    with pytest.raises(InvalidInput, match="steps: 3 there, 4 asked"):
        compare(folder, steps=4)
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(InvalidInput, match="holds no comparison"):
        compare(tmp_path)


def test_other_data_of_the_same_task_make_another_comparison(done, monkeypatch):
    folder, _ = done
    monkeypatch.setattr(SmallRows, "training", lambda self: self.calibration[::-1])
    with pytest.raises(InvalidInput, match="other settings \\(data"):
        compare(folder)


@pytest.mark.parametrize("other", [{"test": [{"input_ids": [3]}]}, {"pooling": "cls"}])
def test_other_test_data_or_another_metric_make_another_comparison(tmp_path, other):
    def asked(**attributes):
        task = SmallRows()
        vars(task).update(attributes)
        return hp.compare_methods(bert(), task, methods=[], steps=0, trials=0, repeats=0, folder=tmp_path)

    first = {"test": [{"input_ids": [2]}], "pooling": "mean"}
    assert asked(**first) == asked(**first, _cache=[1])
    with pytest.raises(InvalidInput, match="other settings \\(test data"):
        asked(**first | other)


def test_a_fine_tune_that_diverges_leaves_no_figures_and_is_tried_again(tmp_path):
    row = compare(tmp_path, methods=["unstructured"], lr=1e30, steps=4).row("unstructured")
    assert "the fine-tune failed" in row.note
    assert (row.tuned_quality, row.tuned_loss, row.tuned_steps) == (None, None, None)
    assert not (tmp_path / "unstructured.json").exists()


def test_a_task_with_one_batch_cannot_be_split():
    task = SmallRows()
    task.calibration = task.calibration[:1]
    with pytest.raises(InvalidInput, match="at least 2"):
        hp.compare_methods(bert(), task)


def test_rows_are_plain_data(done):
    folder, found = done
    document = json.loads((folder / "heads.json").read_text())
    assert MethodRow.from_json(document["row"]) == found.row("heads")
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["method"] == "dense"


def test_without_torchao_the_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    found = compare(methods=["int8"], steps=0, repeats=0)
    assert "headprune[quantise]" in found.row("int8").refused
    assert torch.isfinite(torch.tensor(found.row("dense").loss))
