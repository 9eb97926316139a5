"""Gates that are trained with the model: exact targets, useless heads found, surgery equal to the gates, going on after a kill."""

import math
import random
import textwrap

import pytest
import torch
from child_process import killed_at
from schedule_cases import PLANTED, batches, loss, planted, short_training, tiny
from tiny_models import hidden, llama, tokens

import headprune as hp
from headprune import schedules
from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.models import attention_sites
from headprune.schedules import gate_training

METHODS = sorted(schedules.gate_methods())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero", "noise"])
def test_useless_heads_are_closed(method, kind):
    model, data, loss_fn = planted(kind)
    found = schedules.pruning_aware(
        model, data, hp.Budget(heads=0.5), method=method, steps=120, lr=0.0, loss_fn=loss_fn, compensate=False, dropout=False
    )
    gone = {name: sorted(set(range(4)) - set(heads)) for name, heads in found.plan.items()}
    assert gone == PLANTED
    assert found.quality > -0.02
    assert abs(found.history[-1].details["open_share"] - 0.5) < 0.02  # the gates themselves meet the target


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [hp.Budget(heads=0.4), hp.Budget(params=0.5)])
def test_the_target_is_met_exactly_however_short_the_training(method, budget):
    found = schedules.pruning_aware(tiny(), batches(), budget, method=method, steps=8, lr=1e-3, loss_fn=loss, compensate=False)
    once = schedules.one_shot(tiny(), batches(), budget, loss_fn=loss)
    assert found.plan.removed_heads == once.plan.removed_heads
    assert sum(site.head_map.query_heads for site in attention_sites(found.model)) == 8 - once.plan.removed_heads


def test_a_compiled_model_is_pruned_as_the_model_inside():
    options = {"steps": 3, "loss_fn": loss, "compensate": False, "teacher": True}
    plain, compiled = (
        schedules.pruning_aware(one, batches(), hp.Budget(heads=0.5), **options) for one in (tiny(), torch.compile(tiny()))
    )
    assert compiled.plan.keep == plain.plan.keep
    assert type(compiled.model) is type(plain.model)


@pytest.mark.parametrize("method", METHODS)
def test_surgery_makes_the_gates_real(method):
    """The cut model gives what the trained one gives with its last gates, the heads that the plan lets go closed."""
    from headprune.schedules.gates.reach import gates_in_place

    seen, ids, settled = {}, tokens(2, 7), gate_training.GateTrainer.settled

    def watched(trainer):
        seen["gates"] = settled(trainer)
        seen["weights"] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        return seen["gates"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_training.GateTrainer, "settled", watched)
        options = {"method": method, "steps": 20, "lr": 1e-3, "loss_fn": loss, "compensate": False}
        found = schedules.pruning_aware(tiny(), batches(), hp.Budget(heads=0.5), **options)
    trained = tiny()
    trained.load_state_dict(seen["weights"])
    gates = {name: torch.zeros(4) for name in seen["gates"]}
    for name, heads in found.plan.items():
        gates[name][list(heads)] = seen["gates"][name][list(heads)]
    sites = {site.name: site for site in attention_sites(trained)}
    with gates_in_place(sites, frozenset(), gates):
        expected = hidden(trained, input_ids=ids)
    assert torch.allclose(hidden(found.model, input_ids=ids), expected, atol=1e-5)


@pytest.mark.parametrize("model", [tiny(), llama()], ids=["bert", "llama"])
def test_gates_in_the_operator_are_gates_before_the_output_projection(model):
    from headprune.models.watching import through_headprune
    from headprune.schedules.gates.reach import gates_in_place, through_operator

    sites, batch = {site.name: site for site in attention_sites(model)}, {"input_ids": tokens(), "labels": tokens()}
    loss_fn = lambda model, batch: model(input_ids=batch["input_ids"])[0].square().mean()  # noqa: E731
    grads = {}
    for way in ("operator", "projection"):
        gates = {name: torch.linspace(0, 1.5, site.head_map.query_heads).requires_grad_() for name, site in sites.items()}
        with through_headprune(model):
            reached = through_operator(model, sites, lambda: loss_fn(model, batch))
            assert reached == set(sites)
            with gates_in_place(sites, reached if way == "operator" else frozenset(), gates):
                value = loss_fn(model, batch)
                value.backward()
        grads[way] = [value.detach(), *(gate.grad for gate in gates.values())]
    for one, other in zip(grads["operator"], grads["projection"]):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not reached <= through_operator(model, sites, lambda: loss_fn(model, batch))  # outside, the model runs its own attention


def test_dropout_and_torch_layers_are_gated_too():
    from torch import nn

    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
    )
    data = [torch.randn(4, 6, 32) for _ in range(3)]
    found = schedules.pruning_aware(
        encoder,
        data,
        hp.Budget(heads=0.5),
        steps=30,
        lr=1e-3,
        loss_fn=lambda model, x: model(x)[..., :3].square().mean(),
        compensate=False,
    )
    assert found.plan.removed_heads == 4
    assert found.history[-1].details["through_operator"] == sorted(found.plan)
    assert isinstance(encoder.layers[0].self_attn, nn.MultiheadAttention)


def test_whole_groups_and_protected_heads_are_honoured():
    model, data = llama(), [{"input_ids": tokens(2, 9, seed), "labels": tokens(2, 9, seed)} for seed in range(3)]
    site = attention_sites(model)[0].name
    found = schedules.pruning_aware(
        model, data, hp.Budget(kv_cache=0.5), steps=20, granularity="kv_group", protect={site: [0]}, compensate=False
    )
    assert 0 in found.plan[site]
    assert all(site.head_map.is_uniform for site in attention_sites(found.model))
    assert sum(site.head_map.kv_heads for site in attention_sites(found.model)) == 4


def test_bad_input_is_named_before_training():
    calls = {"batches": batches(), "budget": hp.Budget(heads=0.5), "loss_fn": loss}
    with pytest.raises(InvalidInput, match=r"hard_concret.*hard_concrete"):
        schedules.pruning_aware(tiny(), method="hard_concret", **calls)
    with pytest.raises(InvalidInput, match="steps is 0; expected a whole number, 1 or more"):
        schedules.pruning_aware(tiny(), steps=0, **calls)
    with pytest.raises(InvalidInput, match="distil is given without a teacher; give teacher=True"):
        schedules.pruning_aware(tiny(), distil=hp.Distillation(logits=1.0), **calls)
    with pytest.raises(InfeasibleBudget):
        schedules.pruning_aware(tiny(), min_heads=3, **calls)
    with pytest.raises(InvalidInput, match="training data is empty"):
        schedules.pruning_aware(tiny(), train=[], **calls)
    with pytest.raises(InvalidInput, match="training data is empty"):
        schedules.pruning_aware(tiny(), **{**calls, "batches": []})


def test_a_nan_loss_names_the_step_and_keeps_the_state_before_it(tmp_path):
    def broken(model, batch):
        return loss(model, {"input_ids": batch["input_ids"]}) * (math.nan if model.training and "bad" in batch else 1)

    data = [*batches(), {**batches(1)[0], "bad": True}]
    with pytest.raises(schedules.ScheduleFailed, match=r"train gates.*nan at training step \d.*after step 0") as caught:
        schedules.pruning_aware(
            tiny(), data, hp.Budget(heads=0.5), steps=20, loss_fn=broken, compensate=False, folder=tmp_path / "run"
        )
    assert torch.equal(hidden(caught.value.last_good.model, input_ids=tokens()), hidden(tiny(), input_ids=tokens()))
    state = torch.load(tmp_path / "run" / "training.pt", weights_only=True)
    assert state["step"] < 5
    assert all(value.isfinite().all() for value in state["model"].values())


CHILD = """
    import sys, headprune as hp
    from headprune import schedules
    from headprune.schedules import gate_training
    from schedule_cases import batches, loss, short_training, tiny

    gate_training.SAVE_EVERY = 0.0
    schedules.pruning_aware(
        tiny(), batches(), hp.Budget(heads=0.5), steps=40, lr=1e-3, loss_fn=loss, recover=short_training, folder=sys.argv[1],
        progress=lambda title, done, total: print(title, done, flush=True), method=sys.argv[2],
    )
"""


def test_a_killed_training_goes_on_and_ends_the_same(tmp_path):
    method = random.choice(METHODS)
    options = {"method": method, "steps": 40, "lr": 1e-3, "loss_fn": loss, "recover": short_training}
    expected = schedules.pruning_aware(tiny(), batches(), hp.Budget(heads=0.5), **options)
    marker = random.choice([f"train gates {random.randrange(1, 40)}", "prune 0", "recover 2", "measure 0"])
    killed_at(f"step 1 of 1: {marker}", "-c", textwrap.dedent(CHILD), str(tmp_path / "run"), method)
    found = schedules.pruning_aware(tiny(), batches(), hp.Budget(heads=0.5), folder=tmp_path / "run", **options)
    assert found.plan.keep == expected.plan.keep, (method, marker)
    assert found.quality == pytest.approx(expected.quality, rel=1e-5), (method, marker)
    assert not (tmp_path / "run" / "training.pt").exists()


def test_gates_are_trained_by_the_dense_model_too():
    """No labels, no loss: the target is what the dense model gives."""
    model, data, _ = planted("zero")
    data = [{"input_ids": batch["input_ids"]} for batch in data]
    found = schedules.pruning_aware(
        model, data, hp.Budget(heads=0.5), steps=120, lr=0.0, teacher=True, dropout=False, compensate=False
    )
    assert {name: sorted(set(range(4)) - set(heads)) for name, heads in found.plan.items()} == PLANTED
    assert found.quality is None


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_half_precision_are_trained_in_fp32(method):
    seen = []

    def watched(model, batch):
        seen.append({parameter.dtype for parameter in model.parameters()})
        return loss(model, batch)

    options = {"method": method, "steps": 6, "lr": 1e-3, "loss_fn": watched, "compensate": False}
    found = schedules.pruning_aware(tiny().to(torch.bfloat16), batches(), hp.Budget(heads=0.5), **options)
    assert seen.count({torch.float32}) >= 6
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}
