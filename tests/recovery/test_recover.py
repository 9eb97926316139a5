"""Recovery lowers the loss, keeps the heads, stops for a reason, and goes on after a kill."""

import copy
import math
import random
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial
from itertools import repeat

import pytest
import torch
import transformers
from child_process import environment
from pruned_pairs import padded_batches, pruned_bert, pruned_classifier, pruned_llama, text_batches
from tiny_models import bert, hidden, llama

import headprune as hp
from headprune.errors import InvalidInput
from headprune.recovery import RateRewind, training
from headprune.recovery.batches import Batches, on_the_host, steps_per_pass
from headprune.recovery.budget import TrainingBudget


def same_state(one, other, **tolerance):
    found = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, found[name], **({"rtol": 0.0, "atol": 0.0} | tolerance))


@pytest.mark.parametrize("method", ["full", "projections", "lora"])
def test_training_lowers_the_loss_and_keeps_the_heads(method, tmp_path):
    _, model = pruned_llama()
    before = {site.name: site.head_map for site in hp.attention_sites(model)}
    types = [type(module) for module in model.modules()]
    result = hp.recover(model, text_batches(), method=method, steps=12, lr=5e-3)
    assert [step for step, _ in result.losses] == list(range(1, 13))
    assert result.losses[-1][1] < result.losses[0][1] - 0.1
    assert result.stopped_because == "the budget is used up"
    assert {site.name: site.head_map for site in hp.attention_sites(model)} == before
    assert [type(module) for module in model.modules()] == types
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    hp.save(model, tmp_path / "saved")
    batch = text_batches(1)[0]
    torch.testing.assert_close(hidden(hp.load(tmp_path / "saved"), **batch), hidden(model, **batch), rtol=0, atol=0)


def test_one_process_trains_on_the_gpu_of_the_model(monkeypatch, tmp_path):
    """transformers would take the first one, and accelerate the current one."""
    accelerate = pytest.importorskip("accelerate")
    for module, name, value in (
        (torch.cuda, "is_available", True), (torch.cuda, "device_count", 2), (torch.cuda, "set_device", None),
        (torch.accelerator, "is_available", True),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    asked = partial(training.training_arguments, tmp_path, TrainingBudget.of(1, None, None, 1e-3, 1), 0)
    try:
        for place, options, there in (
            ("cuda:1", {}, "cuda:1"), ("cuda:0", {}, "cuda:0"), ("cpu", {}, "cuda:0"), ("cuda:1", {"use_cpu": True}, "cpu"),
        ):  # fmt: skip
            found = asked(options, torch.device(place))
            assert found.device == torch.device(there)
            assert found.n_gpu == (there != "cpu")
            assert accelerate.Accelerator().device == torch.device("cuda" if place != there == "cuda:0" else there)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_the_place_of_the_model_is_what_training_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(training, "stay", lambda arguments, place: told.append(place))
    _, model = pruned_llama()
    hp.recover(model, text_batches(), steps=1)
    assert told == [torch.device("cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_gpu_is_trained_there():
    dense, model = (one.to("cuda:1") for one in pruned_llama())
    seen, before = set(), torch.cuda.current_device()
    hook = model.register_forward_hook(lambda module, inputs, output: seen.add((output.logits.device, torch.cuda.current_device())))
    hp.recover(model, text_batches(), teacher=dense, steps=2)
    hook.remove()
    assert seen == {(torch.device("cuda:1"), 1)}
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == before


def test_projections_change_nothing_else():
    _, model = pruned_llama()
    before = copy.deepcopy(model)
    hp.recover(model, text_batches(), method="projections", steps=2, lr=1e-3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in (0, 1) for role in "qkvo"}


def test_adapters_of_a_rank_change_weights_by_that_rank():
    _, model = pruned_llama()
    before = copy.deepcopy(model)
    hp.recover(model, text_batches(), method="lora", steps=3, lr=1e-3, method_options={"rank": 2})
    change = (model.model.layers[0].mlp.up_proj.weight - before.model.layers[0].mlp.up_proj.weight).detach()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == 2
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_evaluations_see_the_adapters_of_torchs_own_layers():
    dense, _, batches, loss_fn = pruned_classifier()
    result = hp.recover(dense, batches, batches, loss_fn=loss_fn, method="lora", steps=6, lr=1e-2, eval_steps=6)
    with torch.no_grad():
        merged = -sum(float(loss_fn(dense, batch)) for batch in batches) / len(batches)
    assert result.best == pytest.approx(merged, rel=1e-4)


def test_adapters_are_put_on_the_named_layers_alone():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.inner = torch.nn.Linear(4, 4), torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["proj"](self.proj(x))

    model, batch = Twice(), torch.randn(3, 4)
    before = copy.deepcopy(model)
    options = {"rank": 2, "targets": ["proj"]}
    hp.recover(model, [batch], loss_fn=lambda model, x: model(x).square().mean(), method="lora", steps=3, method_options=options)
    assert torch.equal(model.inner["proj"].weight, before.inner["proj"].weight)
    assert not torch.equal(model.proj.weight, before.proj.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number, 1 or more"),
        ({"rank": "8"}, "rank is '8'; expected a whole number"),
        ({"dropout": 2.0}, r"dropout is 2\.0; expected the share to drop"),
        ({"alpha": "x"}, "alpha is 'x'; expected a number or None"),
        ({"targets": "q_proj"}, "targets is 'q_proj'; expected a list or None"),
        ({"targets": ["model.layers.0.self_attn.qproj"]}, "unknown linear layer .* Did you mean 'model.layers.0.self_attn.q_proj'"),
        ({"targets": ["model.layers.0.self_attn.q_proj", "model.norm"]}, "targets has model.norm, a LlamaRMSNorm; expected"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_the_model_is_touched(options, message):
    _, model = pruned_llama()
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(InvalidInput, match=message):
        hp.recover(model, text_batches(), method="lora", steps=1, method_options=options)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dropout", [None, False, True])
def test_dropout_of_adapters_does_not_hang_on_the_model_s_own(dropout):
    """BERT's are of 0.1; a teacher leaves them out where nothing else is said."""
    shares, seen = {"own": 0.1, "adapters": 0.5}, set()

    def loss_fn(model, batch):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and torch.is_grad_enabled():
                seen.update(name for name, share in shares.items() if module.p == share and module.training)
        return model(**batch).last_hidden_state.square().mean()

    dense = bert(hidden_dropout_prob=0.1)
    options = {"method": "lora", "method_options": {"dropout": 0.5}, "dropout": dropout, "steps": 1}
    hp.recover(copy.deepcopy(dense), padded_batches(1), teacher=dense, loss_fn=loss_fn, **options)
    assert seen == ({"own", "adapters"} if dropout else {"adapters"})


def test_checkpointed_layers_drop_the_same_when_they_run_again():
    dense, model = pruned_llama()
    other = copy.deepcopy(model)
    options = {"teacher": dense, "method": "lora", "method_options": {"dropout": 0.5}, "steps": 2, "lr": 1e-2}
    hp.recover(model, text_batches(), gradient_checkpointing=True, **options)
    hp.recover(other, text_batches(), **options)
    same_state(model, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pair", [pruned_llama, pruned_bert])
def test_distillation_brings_the_outputs_nearer(pair):
    dense, model = pair()
    batches = padded_batches()
    start, weights = copy.deepcopy(model), copy.deepcopy(dense)
    result = hp.recover(model, batches, batches, teacher=dense, steps=30, lr=3e-3)
    error = [float((hidden(some, **batches[0]) - hidden(dense, **batches[0])).square().mean()) for some in (start, model)]
    assert error[1] < 0.7 * error[0]
    assert result.best > result.evaluations[0][1]
    assert result.evaluations[0][0] == 0
    same_state(dense, weights)


def test_a_plain_module_recovers_with_a_loss_function():
    dense, model, batches, loss_fn = pruned_classifier()
    result = hp.recover(model, batches, loss_fn=loss_fn, teacher=dense, steps=20, lr=5e-3)
    assert result.losses[-1][1] < 0.8 * result.losses[0][1]
    plain = hp.recover(model, batches, batches, loss_fn=loss_fn, method="lora", steps=12, lr=5e-3)
    assert plain.best > plain.evaluations[0][1]


def test_named_tuples_are_batches_as_tuples_are():
    pair = namedtuple("pair", "tokens labels")
    dense, model = pruned_llama()
    other = copy.deepcopy(model)
    batches = [pair(batch["input_ids"], batch["labels"]) for batch in text_batches()]
    options = {"teacher": dense, "steps": 2, "lr": 1e-3}
    named = lambda model, batch: model(input_ids=batch.tokens, labels=batch.labels).loss  # noqa: E731
    hp.recover(model, batches, batches[:1], loss_fn=named, **options)
    plain = lambda model, batch: model(input_ids=batch[0], labels=batch[1]).loss  # noqa: E731
    hp.recover(other, list(map(tuple, batches)), [tuple(batches[0])], loss_fn=plain, **options)
    same_state(model, other)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        ids = text_batches(10)[index]["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def test_a_dataset_of_rows_is_made_into_batches():
    _, model = pruned_llama()
    result = hp.recover(model, Rows(), steps=5, lr=5e-3, per_device_train_batch_size=4)
    assert result.losses[-1][1] < result.losses[0][1]


def test_a_stream_of_rows_is_made_into_batches():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return map(Rows().__getitem__, range(len(Rows())))

    _, model = pruned_llama()
    other = copy.deepcopy(model)
    result = hp.recover(model, Stream(), steps=5, lr=5e-3, per_device_train_batch_size=4)
    assert result.losses[-1][1] < result.losses[0][1]
    result = hp.recover(other, torch.utils.data.DataLoader(Stream(), batch_size=4), steps=5, lr=5e-3)
    assert result.losses[-1][1] < result.losses[0][1]


@pytest.mark.parametrize(
    ("data", "options", "ranks", "steps"),
    [
        (Batches(range(6)), {}, 1, 6),
        (Batches(range(6)), {"gradient_accumulation_steps": 4}, 1, 2),  # 4 batches, and the 2 that are left
        (Rows(), {"per_device_train_batch_size": 4}, 1, 3),
        (Rows(), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 2, 2),
    ],
)
def test_a_step_takes_what_accumulation_and_ranks_make_of_a_batch(data, options, ranks, steps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert steps_per_pass(data, options) == steps


@pytest.mark.parametrize(("keep", "together", "rows"), [((8, 8), 2, 30), ((8, 6), 1, 30), ((4, 4), 2, 30), ((2, 3), 1, 42)])
def test_by_default_passes_are_in_proportion_to_the_heads_that_went(keep, together, rows):
    """Of 16; three passes over 10 rows at least. 21 steps of 2 rows are 6 * 11 / 16 passes."""
    seen, model = [], llama()
    if sum(keep) < 16:
        first, *more = ({f"model.layers.{layer}.self_attn": [*range(count)]} for layer, count in enumerate(keep) if count < 8)
        hp.cut(model, first)
        for cut in more:  # after which the share is of the original still
            hp.cut(model, cut)
    model.register_forward_pre_hook(lambda _model, _args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    hp.recover(model, Rows(), per_device_train_batch_size=2, gradient_accumulation_steps=together)
    assert sum(seen) == rows


def test_a_recovered_model_is_new_to_accelerate():
    """Which would neither wrap, compile nor place one that it takes for prepared."""
    _, model = pruned_llama()
    before = set(vars(model))
    hp.recover(model, text_batches(), steps=1)
    assert set(vars(model)) == before


def test_a_loss_that_rose_is_told_where_no_evaluation_keeps_the_best(caplog):
    dense, model = pruned_llama()
    other, same = copy.deepcopy(model), copy.deepcopy(model)
    told = "the training loss rose from"
    hp.recover(model, text_batches(), teacher=dense, steps=12, lr=1e-3)
    hp.recover(other, text_batches(), text_batches(1), teacher=dense, steps=12, lr=3.0)
    assert told not in caplog.text
    hp.recover(same, text_batches(), teacher=dense, steps=12, lr=3.0)
    assert told in caplog.text


def test_the_best_evaluation_is_what_stays():
    _, model = pruned_llama()
    qualities = iter([0.0, 1.0, 3.0, 2.0, 2.5, 1.0, 9.0])
    states = []

    def metric(some):
        states.append(copy.deepcopy(some.state_dict()))
        return next(qualities)

    result = hp.recover(model, text_batches(), metric=metric, steps=12, lr=1e-3, eval_steps=2, patience=3)
    assert result.stopped_because == "no better for 3 evaluations"
    assert (result.best, result.best_step, result.steps) == (3.0, 4, 10)
    assert result.evaluations == ((0, 0.0), (2, 1.0), (4, 3.0), (6, 2.0), (8, 2.5), (10, 1.0))
    assert all(torch.equal(value, states[2][name]) for name, value in model.state_dict().items())


def test_a_loss_that_becomes_nan_leaves_the_last_good_state():
    _, model = pruned_llama()
    calls = []

    def loss_fn(some, batch):
        calls.append(copy.deepcopy(some.state_dict()))
        return some(**batch).loss * (float("nan") if len(calls) > 7 else 1.0)

    result = hp.recover(model, text_batches(), loss_fn=loss_fn, steps=20, lr=1e-3)
    assert result.stopped_because == "the loss is NaN or infinite at step 8; the weights are those of step 6"
    assert all(torch.equal(value, calls[6][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("distil", [None, {"logits": 1.0, "task": 1.0}])
def test_labels_of_which_none_counts_are_told_before_training(distil):
    dense, model = pruned_llama()
    empty = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in text_batches(2)]
    teaching = {} if distil is None else {"teacher": dense, "distil": hp.Distillation(**distil)}
    for train, held_out, name in ((empty, None, "train"), (text_batches(), empty, "eval")):
        with pytest.raises(InvalidInput, match=f"no batch of {name} has a label that counts, all are -100"):
            hp.recover(model, train, held_out, steps=1, **teaching)
    with pytest.raises(
        InvalidInput, match=r"batch 2 of eval, counted from 0, has no label that counts, .* would be NaN; leave it out"
    ):
        hp.recover(model, text_batches(), [*text_batches(2), *empty], steps=1, **teaching)
    hp.recover(model, empty, teacher=dense, steps=1)


def test_a_stream_without_rows_is_refused_as_a_list_is():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    _, model = pruned_llama()
    for train, held_out, name in ((Stream(), None, "train"), (text_batches(), Stream(), "eval"), (iter([]), None, "train")):
        with pytest.raises(InvalidInput, match=f"{name} is empty; give at least one batch"):
            hp.recover(model, train, held_out, steps=1)


def test_a_batch_without_a_label_that_counts_is_told_where_training_meets_it():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            rows = [Rows()[number] for number in range(3)]
            yield from [*rows[:2], rows[2] | {"labels": torch.full_like(rows[2]["labels"], -100)}]

    _, model = pruned_llama()
    found = hp.recover(model, Stream(), steps=3)
    expected = "the loss is NaN or infinite at step 3, whose batch has no label that counts; the weights are those of step 2"
    assert found.stopped_because == expected


def test_a_first_loss_that_is_nan_is_an_error():
    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match="step 1, before anything was trained"):
        hp.recover(model, text_batches(), loss_fn=lambda some, batch: some(**batch).loss * float("inf"), steps=2)


def test_adapters_are_gone_after_an_error():
    _, model = pruned_llama()
    types = [type(module) for module in model.modules()]
    with pytest.raises(InvalidInput, match="returned no loss"):
        hp.recover(model, [{"input_ids": text_batches()[0]["input_ids"]}], method="lora", steps=2)
    assert [type(module) for module in model.modules()] == types


KILLED = """
import os, signal, sys
from pruned_pairs import pruned_llama, text_batches
import headprune as hp

dense, model = pruned_llama()
stop = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 7 else None
hp.recover(model, text_batches(), text_batches(2), teacher=dense, steps=16, lr=2e-3, save_steps=3, eval_steps=4,
           output_dir=sys.argv[1], progress=stop)
"""


def test_a_killed_recovery_goes_on_and_ends_the_same(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], capture_output=True, text=True, env=environment()
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    options = {"steps": 16, "lr": 2e-3, "save_steps": 3, "eval_steps": 4}
    dense, whole = pruned_llama()
    expected = hp.recover(whole, text_batches(), text_batches(2), teacher=dense, **options)
    seen = []
    _, model = pruned_llama()
    progress = lambda done, _: seen.append(done)  # noqa: E731
    result = hp.recover(
        model, text_batches(), text_batches(2), teacher=dense, output_dir=tmp_path / "run", progress=progress, **options
    )
    assert seen[0] == 7
    same_state(model, whole, rtol=1e-5, atol=1e-6)
    assert [step for step, _ in result.losses] == list(range(1, 17))
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(expected.losses))
    torch.testing.assert_close(torch.tensor(result.evaluations), torch.tensor(expected.evaluations))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    _, again = pruned_llama()
    assert hp.recover(again, text_batches(), text_batches(2), teacher=dense, output_dir=tmp_path / "run", **options) == result
    same_state(again, model)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_that_was_cut_off_is_not_taken_up(method, tmp_path):
    options = {"steps": 8, "lr": 2e-3, "method": method}
    _, whole = pruned_llama()
    hp.recover(whole, text_batches(), **options)

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    _, model = pruned_llama()
    with pytest.raises(KeyboardInterrupt):
        hp.recover(model, text_batches(), save_steps=2, output_dir=tmp_path, progress=stop, **options)
    (tmp_path / "checkpoint-4" / "complete").unlink()
    _, model = pruned_llama()
    hp.recover(model, text_batches(), save_steps=2, output_dir=tmp_path, **options)
    same_state(model, whole, rtol=1e-5, atol=1e-6)


def test_a_folder_of_another_recovery_is_refused(tmp_path):
    _, model = pruned_llama()
    hp.recover(model, text_batches(), steps=2, output_dir=tmp_path)
    with pytest.raises(InvalidInput, match=r"a recovery with other settings \(steps: 2 there, 3 asked\)"):
        hp.recover(pruned_llama()[1], text_batches(), steps=3, output_dir=tmp_path)
    with pytest.raises(InvalidInput, match=r"with other settings \(weights"):
        hp.recover(pruned_llama(seed=1)[1], text_batches(), steps=2, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"teacher": pruned_llama(seed=1)[0]}, "teacher"),
        ({"train": text_batches()[::-1]}, "train"),
        ({"eval": text_batches(1)}, "eval"),
        ({"loss_fn": lambda model, batch: 7 * model(**batch).loss}, "functions"),
    ],
)
def test_a_recovery_by_another_teacher_or_other_data_is_another(other, named, tmp_path):
    dense, model = pruned_llama()
    options = {"train": text_batches(), "teacher": dense, "steps": 2, "output_dir": tmp_path}
    result = hp.recover(model, **options)
    assert hp.recover(pruned_llama()[1], **options) == result
    with pytest.raises(InvalidInput, match=rf"with other settings \({named}"):
        hp.recover(pruned_llama()[1], **options | other)


def of_first_token(output, batch):
    return output.logits[:, 0]


def of_last_token(output, batch):
    return output.logits[:, -1]


@pytest.mark.parametrize(
    ("option", "one", "other", "named"),
    [
        ("rewind", RateRewind(math.cos, 0, 2), RateRewind(math.cos, 3, 5), "lr"),
        ("lr", math.cos, math.sin, "lr"),
        ("distil", *(hp.Distillation(embedding=1.0, embed=embed) for embed in (of_first_token, of_last_token)), "distil"),
    ],
)
def test_recoveries_by_other_functions_are_others(option, one, other, named, tmp_path):
    dense, model = pruned_llama()
    given = {"teacher": dense, "output_dir": tmp_path} | ({} if option == "rewind" else {"steps": 2})
    hp.recover(model, text_batches(), **given, **{option: one})
    with pytest.raises(InvalidInput, match=rf"with other settings \({named}"):
        hp.recover(pruned_llama()[1], text_batches(), **given, **{option: other})


@pytest.mark.parametrize(
    ("wrong", "told"), [({"max_grad_nrm": 1.0}, "max_grad_nrm"), ({"method_options": {"rnk": 2}, "method": "lora"}, "rnk")]
)
def test_a_refused_argument_can_be_put_right_in_the_same_folder(wrong, told, tmp_path):
    options = {"steps": 2, "output_dir": tmp_path / "run"}
    with pytest.raises(InvalidInput, match=told):
        hp.recover(pruned_llama()[1], text_batches(), **options, **wrong)
    assert hp.recover(pruned_llama()[1], text_batches(), **options).steps == 2


def test_minutes_bound_the_time_and_bring_the_rate_to_zero():
    """By a clock that ticks at every look."""
    _, model = pruned_llama()
    ticks, rates = iter(range(1000)), []

    class Rates(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **_):
            rates.append(lr_scheduler.get_last_lr()[0])

    result = hp.recover(model, text_batches(), minutes=1, clock=lambda: float(next(ticks)), lr=1e-3, warmup=2, callbacks=[Rates()])
    assert 60 <= result.seconds < 70
    assert result.steps == len(rates)
    assert 5 < result.steps < 60
    assert rates[-1] < 0.1 * max(rates)
    assert max(rates) < 1e-3


def test_minutes_that_are_over_before_anything_is_learnt_are_told(caplog):
    for minutes, few in ((1, True), (50, False)):
        ticks = iter(range(10_000))
        caplog.clear()
        hp.recover(pruned_llama()[1], text_batches(), minutes=minutes, warmup=2, clock=lambda ticks=ticks: 10.0 * next(ticks))
        assert any("steps fit into minutes=1" in record.message for record in caplog.records) == few


def test_accumulated_batches_are_one_larger_batch():
    ids = text_batches(1, batch=8)[0]["input_ids"]
    halves = [{"input_ids": part, "labels": part} for part in ids.chunk(2)]
    _, one = pruned_llama()
    hp.recover(one, [{"input_ids": ids, "labels": ids}], steps=3, lr=1e-3)
    _, two = pruned_llama()
    hp.recover(two, halves, steps=3, lr=1e-3, gradient_accumulation_steps=2)
    same_state(one, two, rtol=1e-3, atol=1e-5)


def test_mixed_precision_and_checkpointing_leave_the_model_as_it_was():
    """And the random numbers of others."""
    dense, model = pruned_llama()
    expected = copy.deepcopy(model)
    random.seed(3)
    torch.manual_seed(3)
    drawn = random.random(), torch.rand(1)
    random.seed(3)
    torch.manual_seed(3)
    hp.recover(model, text_batches(), teacher=dense, steps=3, lr=1e-3, bf16=True, gradient_checkpointing=True)
    assert (random.random(), torch.rand(1)) == drawn
    assert "forward" not in vars(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model(**text_batches(1)[0]).logits.dtype == torch.float32
    start = torch.nn.utils.parameters_to_vector(expected.parameters()).detach()
    hp.recover(expected, text_batches(), teacher=dense, steps=3, lr=1e-3)
    moved = [torch.nn.utils.parameters_to_vector(some.parameters()).detach() - start for some in (model, expected)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "unknown recovery method 'lorra'. Did you mean 'lora'"),
        ({"steps": 2, "minutes": 1}, "give one of them"),
        ({"steps": 0}, "steps is 0; expected more than 0"),
        ({"steps": 1.5}, "steps is 1.5; expected a whole number"),
        ({"minutes": "2"}, "minutes is '2'; expected a number or None"),
        ({"warmup": -1}, "warmup is -1; expected a whole number, 0 or more"),
        ({"patience": 0}, "patience is 0; expected a whole number, 1 or more"),
        ({"metric": 3}, "metric is 3; expected a function"),
        ({"teacher": 3}, r"teacher is 3; expected a torch\.nn\.Module .* or a path or None"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"steps": 2, "weight_decai": 3}, "unknown option of recover 'weight_decai'. Did you mean 'weight_decay'"),
        ({"eval_steps": 0.5}, r"eval_steps is 0\.5; expected a whole number, 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected a whole number, 1 or more"),
        ({"learning_rate": 1e-3}, "recover does not read learning_rate of transformers.TrainingArguments; give lr."),
        ({"num_train_epochs": 1}, "does not read num_train_epochs .*; give steps or minutes"),
        ({"lr_scheduler_type": "cosine"}, "does not read lr_scheduler_type .*; give lr as a function of the step"),
        ({"per_device_train_batch_size": 4}, "is 4, and train holds batches already; .*gradient_accumulation_steps=4"),
        ({"eval": text_batches(1), "per_device_eval_batch_size": 2}, "is 2, and eval holds batches already"),
        ({"distil": hp.Distillation(logits=1.0)}, "without a teacher"),
    ],
)
def test_bad_arguments_are_named(options, message):
    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match=message):
        hp.recover(model, text_batches(), **options)


def test_what_gives_nothing_to_train_is_named():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return repeat(Rows()[0])

    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match="the data do not tell how many they are; give steps or minutes"):
        hp.recover(model, Endless())
    model.requires_grad_(False)
    with pytest.raises(InvalidInput, match=r"no parameter of LlamaForCausalLM asks for gradients; call requires_grad_\(\)"):
        hp.recover(model, text_batches(), steps=1)


def test_a_model_does_not_teach_itself():
    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match="the teacher is the model itself"):
        hp.recover(model, text_batches(), teacher=model)


def test_no_batches_are_an_error():
    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match="train is empty"):
        hp.recover(model, [])


class Breaks(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def test_weights_that_become_nan_in_the_last_step_are_not_kept():
    _, model = pruned_llama()
    before, calls = copy.deepcopy(model), []

    def loss_fn(model, batch):
        calls.append(1)
        loss = model(**batch).loss
        return Breaks.apply(loss) if len(calls) == 3 else loss

    result = hp.recover(model, text_batches(), loss_fn=loss_fn, steps=3, lr=1e-3)
    assert result.diverged
    assert "weights are NaN or infinite after step 3" in result.stopped_because
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_a_recovery_that_broke_is_not_read_back_as_finished(tmp_path):
    _, model = pruned_llama()
    broken = [True]

    def loss_fn(model, batch):
        loss = model(**batch).loss
        return loss * float("nan") if broken[0] and loss_fn.calls.append(1) is None and len(loss_fn.calls) > 3 else loss

    loss_fn.calls = []
    options = {"loss_fn": loss_fn, "steps": 6, "lr": 1e-3, "output_dir": tmp_path / "run"}
    assert hp.recover(copy.deepcopy(model), text_batches(), **options).diverged
    broken[0] = False
    result = hp.recover(model, text_batches(), **options)
    assert not result.diverged
    assert result.steps == 6


def test_relations_are_learnt_with_checkpointing_as_without():
    dense, model = pruned_llama()
    other = copy.deepcopy(model)
    options = {"teacher": dense, "distil": hp.Distillation(relations=1.0), "steps": 2, "lr": 1e-3}
    hp.recover(model, text_batches(), gradient_checkpointing=True, **options)
    hp.recover(other, text_batches(), **options)
    same_state(model, other, rtol=1e-4, atol=1e-6)


def test_a_bad_argument_leaves_a_model_that_was_to_be_rewound_alone():
    dense, model = pruned_llama()
    before = copy.deepcopy(model)
    earlier = copy.deepcopy(dense)
    for parameter in earlier.parameters():
        parameter.data.mul_(2)
    with pytest.raises(InvalidInput, match=r"lr is -1\.0"):
        hp.recover(model, text_batches(), lr=-1.0, rewind=earlier)
    same_state(model, before)


def test_batches_that_lie_on_a_device_are_told_from_those_on_the_host():
    """Only memory of the host can be pinned."""
    there, here = ({"input_ids": torch.zeros(2, dtype=torch.long, device=device)} for device in ("meta", "cpu"))
    assert not on_the_host(Batches([there]))
    assert all(map(on_the_host, (Batches([here]), Batches(["text"]), None)))
