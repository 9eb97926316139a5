"""One-shot and iterative pruning: exact targets, stops, and going on after a kill."""

import itertools
import json
import math
import random
import textwrap

import pytest
import torch
from child_process import killed_at
from schedule_cases import batches, loss, short_training, tiny
from tiny_models import hidden, tokens

import headprune as hp
from headprune import schedules
from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.models import attention_sites
from headprune.planning.latency_table import LatencyTable, key_of
from headprune.scoring import SiteShape
from headprune.surgery import load


def heads(model) -> int:
    return sum(site.head_map.query_heads for site in attention_sites(model))


@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"steps": 3, "spacing": "cubic"}, {"steps": 2, "spacing": "geometric"}, {"per_step": 0.2}]
)
@pytest.mark.parametrize("budget", [hp.Budget(heads=0.5), hp.Budget(params=0.3), hp.Budget(flops=0.4)])
def test_iterative_ends_exactly_where_one_shot_does(budget, options):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    once = schedules.one_shot(model, batches(), budget, loss_fn=loss)
    found = schedules.iterative(model, batches(), budget, loss_fn=loss, **options)
    assert found.plan.removed_heads == once.plan.removed_heads == heads(model) - heads(found.model)
    assert found.history[-1].removed >= budget.fraction - 1e-9
    removed = [step.removed for step in found.history]
    assert removed == sorted(removed)
    assert removed[1] < removed[-1]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("schedule", ["iterative", "lottery_ticket"])
def test_a_latency_budget_is_kept_by_the_table_of_the_original_at_every_step(schedule):
    """Whose times are those of its attentions with fewer heads; the second layer runs another length."""
    first, second = attention_sites(tiny())
    key = key_of(SiteShape.of(first))
    times = {key: (100, 300, 600, 800, 1000), f"{key}, states [2, 5]": (50, 100, 150, 200, 250)}
    table = LatencyTable("here", "float32", 1, 8, times, 500, {second.name: f"{key}, states [2, 5]"})
    budget, options = hp.Budget(latency=0.3, table=table), {"loss_fn": loss, "compensate": False, "criterion": "random"}
    if schedule == "lottery_ticket":
        options["recover"] = short_training
    found = schedules.get_schedule(schedule)(tiny(), batches(), budget, steps=3, **options)
    left = [len(found.plan[name]) for name in (first.name, second.name)]
    spent = times[key][left[0]] + times[f"{key}, states [2, 5]"][left[1]] + 500
    assert spent <= 0.7 * 1750
    assert found.history[-1].removed == pytest.approx(1 - spent / 1750)
    assert [step.removed for step in found.history] == sorted(step.removed for step in found.history)


def test_the_plan_is_told_in_the_heads_of_the_original():
    model, ids = tiny(), tokens(2, 7)
    found = schedules.iterative(model, batches(), hp.Budget(heads=0.5), loss_fn=loss, steps=4, compensate=False)
    with hp.gated(model, found.plan):
        expected = hidden(model, input_ids=ids)
    assert torch.allclose(hidden(found.model, input_ids=ids), expected, atol=1e-5)
    assert [len(heads) for heads in found.plan.values()] == [site.head_map.query_heads for site in attention_sites(found.model)]


def test_protected_heads_are_those_of_the_original():
    model = tiny()
    site = attention_sites(model)[0].name
    found = schedules.iterative(model, batches(), hp.Budget(heads=0.6), loss_fn=loss, steps=3, protect={site: [1, 3]})
    assert {1, 3} <= set(found.plan[site])


def test_plans_can_be_tried_and_feed_forwards_re_solved_at_every_cut():
    options = {"steps": 2, "loss_fn": loss, "trials": 2, "feed_forward": True}
    found = schedules.iterative(tiny(), batches(), hp.Budget(heads=0.5), **options)
    assert found.plan.removed_heads == 4
    assert "try plans" in found.history[1].seconds
    plain = schedules.iterative(tiny(), batches(), hp.Budget(heads=0.5), steps=2, loss_fn=loss)
    assert not torch.equal(hidden(found.model, input_ids=tokens()), hidden(plain.model, input_ids=tokens()))


def test_steps_end_at_the_given_targets():
    from headprune.schedules.spacing import targets

    assert targets(0.5, None, 0.2, "linear") == [0.2, 0.4, 0.5]
    assert targets(0.5, 2, None, "cubic") == [pytest.approx(0.5 * (1 - 0.5**3)), 0.5]
    assert targets(0.75, 2, None, "geometric") == [pytest.approx(0.5), 0.75]
    wrongs = {
        "steps is 0": {"steps": 0},
        "give one of them": {"steps": 2, "per_step": 0.1},
        "per_step is 1.5; expected a fraction": {"per_step": 1.5},
        "Did you mean 'cubic'": {"spacing": "cubical", "steps": 2},
    }
    for told, wrong in wrongs.items():
        with pytest.raises(InvalidInput, match=told):
            schedules.iterative(tiny(), batches(), hp.Budget(heads=0.5), loss_fn=loss, **wrong)


@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_the_step_that_loses_too_much_is_taken_back(tmp_path, kept_in):
    model, folder = tiny(), tmp_path / "run" if kept_in == "folder" else None
    quality = {8: 1.0, 6: 0.99, 4: 0.98, 2: 0.5}
    options = {"steps": 3, "max_drop": 0.05, "loss_fn": loss, "metric": lambda model: quality[heads(model)], "folder": folder}
    found = schedules.iterative(model, batches(), hp.Budget(heads=0.75), **options)
    assert heads(found.model) == 4
    assert found.plan.removed_heads == 4
    assert found.quality == 0.98
    assert [step.accepted for step in found.history] == [True, True, True, False]
    assert "step 3" in found.stopped
    assert "49.0%" not in found.stopped
    assert "50.0%" in found.stopped
    two = schedules.iterative(model, batches(), hp.Budget(heads=0.5), loss_fn=loss, steps=2)
    assert torch.equal(hidden(found.model, input_ids=tokens()), hidden(two.model, input_ids=tokens()))
    if folder:
        again = schedules.iterative(model, batches(), hp.Budget(heads=0.75), **options)
        assert heads(again.model) == 4
        assert again.stopped == found.stopped


def test_a_finished_folder_is_not_done_again_and_holds_the_model(tmp_path):
    model, shown = tiny(), []
    options = {"loss_fn": loss, "steps": 2, "recover": short_training, "folder": tmp_path / "run"}
    found = schedules.iterative(model, batches(), hp.Budget(heads=0.5), **options)
    again = schedules.iterative(model, batches(), hp.Budget(heads=0.5), progress=lambda *call: shown.append(call), **options)
    assert not shown
    assert again.plan.keep == found.plan.keep
    for other in (again.model, load(tmp_path / "run" / "model")):
        assert torch.equal(hidden(other, input_ids=tokens()), hidden(found.model, input_ids=tokens()))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [step["number"] for step in history["steps"]] == [0, 1, 2]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "settings.json",
        "history.json",
        "step-002",
        "plan.json",
        "model",
    }


def test_a_folder_of_other_settings_is_refused(tmp_path):
    schedules.one_shot(tiny(), batches(), hp.Budget(heads=0.5), loss_fn=loss, folder=tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"other settings.*seed"):
        schedules.one_shot(tiny(), batches(), hp.Budget(heads=0.5), loss_fn=loss, folder=tmp_path / "run", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InvalidInput, match="holds no schedule"):
        schedules.one_shot(tiny(), batches(), hp.Budget(heads=0.5), loss_fn=loss, folder=tmp_path / "mine")


def test_a_folder_of_another_latency_table_is_refused(tmp_path):
    def asked(*times):
        table = LatencyTable("here", "float32", 1, 8, {key_of(SiteShape.of(attention_sites(tiny())[0])): times}, 100)
        options = {"loss_fn": loss, "criterion": "random", "folder": tmp_path / "run"}
        return schedules.one_shot(tiny(), batches(), hp.Budget(latency=0.3, table=table), **options)

    assert asked(0, 10, 20, 30, 40).history == asked(0, 10, 20, 30, 40).history
    with pytest.raises(InvalidInput, match="other settings \\(latency table"):
        asked(0, 12, 22, 31, 40)


@pytest.mark.parametrize("name", ["one_shot", "iterative", "lottery_ticket"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitude_l2", "recover": hp.RecoverySettings(steps=1)}, "the training data is empty"),
        ({"criterion": "magnitude_l2", "train": torch.utils.data.DataLoader([])}, "the training data is empty"),
        ({"criterion": "fisher", "train": batches()}, "the calibration set is empty, and criterion 'fisher' runs the model"),
        ({"criterion": "magnitude_l2", "trials": 2}, "the calibration set is empty, and trials=2 runs the model"),
    ],
)
def test_empty_data_is_refused_before_anything_runs(name, options, message):
    never = {"recover": lambda *_: pytest.fail("trained"), "metric": lambda *_: pytest.fail("measured")}
    with pytest.raises(InvalidInput, match=message):
        getattr(schedules, name)(tiny(), [], hp.Budget(heads=0.5), loss_fn=loss, **{**never, **options})


def test_a_target_below_the_minimum_is_refused_before_anything_runs():
    with pytest.raises(InfeasibleBudget, match=r"heads=0\.5"):
        schedules.iterative(tiny(), batches(), hp.Budget(heads=0.7), min_heads=2, loss_fn=lambda *_: pytest.fail("ran"))
    with pytest.raises(InvalidInput, match="min_heads"):
        schedules.one_shot(tiny(), batches(), hp.Budget(heads=0.6), min_head=2, loss_fn=loss)
    with pytest.raises(InvalidInput, match=r"max_drop is -0\.1; expected the share of the quality that may be lost"):
        schedules.iterative(tiny(), batches(), hp.Budget(heads=0.5), max_drop=-0.1, loss_fn=loss)
    with pytest.raises(InvalidInput, match="max_drop needs a quality: give metric=, loss_fn=, or batches with labels"):
        schedules.iterative(tiny(), batches(), hp.Budget(heads=0.5), max_drop=0.1, criterion="magnitude_l2")
    options = {"loss_fn": lambda *_: pytest.fail("ran"), "recover": lambda *_: pytest.fail("trained")}
    with pytest.raises(InvalidInput, match="unknown normalization 'layer'"):
        schedules.lottery_ticket(tiny(), batches(), hp.Budget(heads=0.5), normalize="layer", **options)
    with pytest.raises(InvalidInput, match=r"'movement' is recorded while a model is trained.*pruning_aware"):
        schedules.lottery_ticket(tiny(), batches(), hp.Budget(heads=0.5), criterion="movement", **options)


@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_a_nan_loss_stops_says_where_and_keeps_the_last_good_state(tmp_path, kept_in):
    def breaks_in_the_second(model, round):
        if round.number == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)

    folder = tmp_path / "run" if kept_in == "folder" else None
    options = {"loss_fn": loss, "steps": 2, "folder": folder}
    with pytest.raises(schedules.ScheduleFailed, match=r"step 2 of 2, measure.*NaN.*after step 1") as caught:
        schedules.iterative(tiny(), batches(), hp.Budget(heads=0.5), recover=breaks_in_the_second, **options)
    good = caught.value.last_good
    assert heads(good.model) == 6
    assert good.plan.removed_heads == 2
    assert hidden(good.model, input_ids=tokens()).isfinite().all()


CHILD = """
    import sys, time, headprune as hp
    from headprune import schedules
    from schedule_cases import batches, loss, short_training, tiny

    def progress(title, done, total):
        print(title, done, flush=True)
        time.sleep(0.05)

    schedules.iterative(
        tiny(), batches(), hp.Budget(heads=0.75), steps=3, loss_fn=loss, recover=short_training, folder=sys.argv[1],
        progress=progress,
    )
"""


def test_a_killed_schedule_goes_on_and_ends_the_same(tmp_path):
    options = {"steps": 3, "loss_fn": loss, "recover": short_training}
    expected = schedules.iterative(tiny(), batches(), hp.Budget(heads=0.75), **options)
    step, stage = random.choice((1, 2, 3)), random.choice(("score", "prune", "recover", "measure"))
    marker = f"step {step} of 3: {stage} {random.choice((0, 1))}"
    killed_at(marker, "-c", textwrap.dedent(CHILD), str(tmp_path / "run"))
    found = schedules.iterative(tiny(), batches(), hp.Budget(heads=0.75), folder=tmp_path / "run", **options)
    assert found.plan.keep == expected.plan.keep, marker
    assert found.quality == pytest.approx(expected.quality, rel=1e-5), marker
    assert len(found.history) == 4


def test_recovery_by_the_trainer_follows_each_cut_and_leaves_only_its_report(tmp_path):
    settings = hp.RecoverySettings(steps=3, lr=1e-3, teacher=True, last=2)
    model, folder = tiny(), tmp_path / "run"
    found = schedules.iterative(model, batches(), hp.Budget(heads=0.5), steps=2, loss_fn=loss, recover=settings, folder=folder)
    assert [step.details["recovery"]["steps"] for step in found.history[1:]] == [3, 6]
    assert {path.name for path in folder.iterdir()} == {"settings.json", "history.json", "step-002", "plan.json", "model"}
    again = schedules.iterative(model, batches(), hp.Budget(heads=0.5), steps=2, loss_fn=loss, recover=settings, folder=folder)
    assert again.history == found.history


def test_a_recovery_whose_loss_becomes_nan_ends_the_schedule_before_it(tmp_path):
    def loss_until(model, batch):
        return loss(model, batch) * (math.nan if model.training and heads(model) < 5 and next(ran) > 1 else 1)

    ran = itertools.count(1)
    settings = hp.RecoverySettings(steps=3, lr=1e-3)
    with pytest.raises(schedules.ScheduleFailed, match=r"step 2 of 2, recover.*NaN.*after step 1") as caught:
        schedules.iterative(tiny(), batches(), hp.Budget(heads=0.75), steps=2, loss_fn=loss_until, recover=settings)
    assert caught.value.last_good.plan.removed_heads == 3


def test_pairs_of_a_data_loader_run_as_the_loss_runs_them():
    model = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    data = torch.utils.data.TensorDataset(torch.randn(24, 6, 16), torch.randn(24, 6, 16))
    error = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(dim=(1, 2))  # noqa: E731
    result = hp.one_shot(model, torch.utils.data.DataLoader(data, 6), hp.Budget(heads=0.5), loss_fn=error)
    assert heads(result.model) == 2
