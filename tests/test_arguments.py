"""Plain mistakes in a call are one clear line, before anything is computed or written."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import llama, tokens
from torch import nn

import headprune as hp
from headprune.arguments import check_arguments, fits, hints_of
from headprune.evaluation import compare
from headprune.files import refuse_unwritable
from headprune.planning import sensitivity
from headprune.scoring.masked_losses import masked_losses

BATCHES = [{"input_ids": rows, "labels": rows} for rows in tokens(8, 12).split(4)]
HALF = hp.Budget(heads=0.5)
MODEL = llama()
SCORES = hp.score(MODEL, BATCHES)
PLAN = hp.plan(SCORES, HALF)
SITE = next(iter(SCORES))
OBSERVED = hp.observe(MODEL, BATCHES, {"gate_gradient"})
QUERY, KEY = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)
PACKED = [QUERY[0].transpose(0, 1), KEY[0].transpose(0, 1), KEY[0].transpose(0, 1), STARTS, STARTS]
A_MODULE = r"model is .*; expected a torch\.nn\.Module"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hp.HeadMap(None, 2), r"HeadMap\(None, 2\): expected .* such as HeadMap\("),
        (lambda: hp.HeadMap((0, 0.5), 2), r"HeadMap\(\(0, 0\.5\), 2\): expected"),
        (lambda: hp.HeadMap((0, 1), "2"), r"HeadMap\(\(0, 1\), '2'\): expected"),
        (lambda: hp.HeadMap((0, 1), 2.0), r"HeadMap\(\(0, 1\), 2\.0\): expected"),
        (lambda: hp.HeadMap.uniform(None), "None query heads cannot be spread evenly over None"),
        (lambda: hp.HeadMap.uniform(-4, 2), "-4 query heads cannot be spread evenly over 2"),
        (lambda: hp.Budget(latency=0.5, table="t.json"), r"table is 't\.json'; expected LatencyTable \(.*measure_latency_table"),
        (lambda: hp.Budget(flops=0.5, sequence_length=1.5), r"sequence_length is 1\.5; expected a whole number, 1 or more"),
        (lambda: hp.PruningPlan(None, {}), "keep is None; expected a dict"),
        (lambda: hp.PruningPlan.load(None), "the path is None; expected the name of a file"),
        (lambda: hp.Observations.load(3), "the path is 3; expected the name of a file"),
        (lambda: SCORES.save(None), "the path is None; expected the name of a file"),
        (lambda: hp.observe(MODEL, BATCHES, "weights"), "needs is 'weights'; expected a list"),
        (lambda: hp.score(MODEL, BATCHES, loss_fn="mean"), "loss_fn is 'mean'; expected a function or None"),
        (lambda: hp.score(MODEL, BATCHES, los_fn=len), r"unknown option of score 'los_fn'\. Did you mean 'loss_fn'\?"),
        (lambda: hp.score(MODEL, BATCHES, gram_device="gpu"), "gram_device is 'gpu'; expected a device such as"),
        (lambda: hp.score_observations(None, "fisher"), r"observed is None; expected Observations \(hp\.observe gives them\)"),
        (lambda: hp.portraits(None), r"observed is None; expected Observations \(hp\.observe gives them\)"),
        (lambda: hp.ranking_stability(OBSERVED, "fisher", keep=50), "keep is 50; expected the fraction of the heads that stay"),
        (lambda: SCORES.compare(None), r"other is None; expected HeadScores \(hp\.score gives them\)"),
        (lambda: SCORES.compare(SCORES, keep="half"), "keep is 'half'; expected a number"),
        (lambda: hp.scoring.block_fisher(SCORES), r"observed is HeadScores.*; expected Observations \(hp\.observe gives them\)"),
        (lambda: masked_losses(MODEL, BATCHES[0], None), "masks is None; expected a dict"),
        (lambda: masked_losses(MODEL, BATCHES[0], {}, rows=0.5), r"rows is 0\.5; expected a whole number or None"),
        (lambda: hp.planning.diverse(None, OBSERVED), r"scores is None; expected HeadScores \(hp\.score gives them\)"),
        (lambda: hp.planning.diverse(SCORES, OBSERVED, "much"), "strength is 'much'; expected a number"),
        (lambda: hp.planning.fisher_mask_search(SCORES, HALF), r"observed is HeadScores.*; expected Observations"),
        (lambda: hp.planning.search_layer_weights(SCORES, HALF, 0.5), r"error is 0\.5; expected a function"),
        (lambda: hp.planning.masked_fitness(MODEL, BATCHES[0]), "batches is one dict; expected a list of batches: put it into one"),
        (lambda: sensitivity(MODEL, BATCHES[0], SCORES), "batches is one dict; expected a list of batches: put it into one"),
        (lambda: hp.surgery.fold_gates(MODEL, None), "gates is None; expected a dict"),
        (lambda: hp.surgery.fold_gates(MODEL, {SITE: [1] * 8}), r"gates of .*: \[1, 1.*; expected a tensor of 8 finite numbers"),
        (lambda: hp.evaluation.paired_bootstrap(None, None), "first is None; expected Metric"),
        (lambda: hp.causal_losses(MODEL, None), "batch is None; expected a dict"),
        (lambda: hp.causal_losses(MODEL, BATCHES[0], tokens=-1), "tokens is -1; expected a whole number, 1 or more"),
        (lambda: hp.criterion("mine", needs=None, source="", cost=""), "needs is None; expected a list"),
        (lambda: hp.criterion("mine", needs=["wieghts"], source="", cost=""), "Did you mean 'weights'"),
        (lambda: hp.plan(SCORES, HALF, protect=3), "protect is 3; expected a dict or a list or a string"),
        (lambda: hp.plan(SCORES, HALF, allocation=["global"]), r"allocation is \['global'\]; expected a string or None"),
        (lambda: hp.plan(SCORES, HALF, allocation="optimal", sensitivity="s.json"), "; expected Sensitivity"),
        (lambda: sensitivity(MODEL, BATCHES, None), r"scores is None; expected HeadScores \(hp\.score gives them\)"),
        (lambda: hp.prune(MODEL, PLAN, feed_forward=True), "feed_forward=True re-solves .*; give calibration="),
        (lambda: hp.prune(MODEL, PLAN, BATCHES, verify="no"), "verify is 'no'; expected True or False"),
        (lambda: hp.prune(MODEL, PLAN, BATCHES, forward=3), "forward is 3; expected a function or None"),
        (lambda: hp.prune(plan=PLAN), A_MODULE),
        (lambda: hp.cut(MODEL, {}, run="once"), "run is 'once'; expected a function or None"),
        (lambda: hp.search_plan(MODEL, SCORES, HALF, BATCHES, trails=3), "option of search_plan 'trails'. Did you mean 'trials'"),
        (lambda: hp.search_plan(MODEL, SCORES, HALF, BATCHES, trials=0), "trials is 0; expected a whole number, 1 or more"),
        (lambda: hp.search_plan(MODEL, SCORES, HALF, BATCHES, tokens=-1), "tokens is -1; expected a whole number, 1 or more"),
        (lambda: hp.load(None), "folder is None; expected a path"),
        (lambda: hp.open_streamed(None), "folder is None; expected a path"),
        (lambda: hp.open_streamed("m", dtype="float32"), "dtype is 'float32'; expected a dtype such as torch.float32 or None"),
        (lambda: hp.diff(None, MODEL), r"before is None; expected a torch\.nn\.Module .* or a path"),
        (lambda: hp.report(None), "folder is None; expected a path"),
        (lambda: hp.estimate("m", HALF, utilisation=0), "utilisation is 0; expected the share of the peak rate"),
        (lambda: hp.evaluate(None, len, inputs=BATCHES[0]), A_MODULE),
        (lambda: hp.evaluate(MODEL, len, inputs={}), "needs inputs="),
        (lambda: compare(MODEL, None, len, inputs=BATCHES[0]), r"pruned is None; expected a torch\.nn\.Module"),
        (lambda: hp.compare_methods(MODEL, None), r"task is None; expected Task \(.*build_task gives one\)"),
        (lambda: hp.recover(MODEL, BATCHES, loss_fn=3), "loss_fn is 3; expected a function or None"),
        (lambda: hp.recover(MODEL, BATCHES, stpes=3), r"unknown option of recover 'stpes'\. Did you mean 'steps'\?$"),
        (lambda: hp.recover(MODEL, BATCHES, steps=1, seed=-1), "seed is -1; expected a whole number, 0 or more"),
        (lambda: hp.Distillation(logits="1"), "logits is '1'; expected a number"),
        (lambda: hp.Distillation(logits=1.0, more=[]), r"more is \[\]; expected a dict"),
        (lambda: hp.Distillation(logits=1.0, more={"hidden": "x"}), "the weight of hidden is x; expected more than 0"),
        (lambda: hp.Distillation(logits=1.0, task=-1.0), r"the weight of task is -1\.0; expected 0 or more"),
        (lambda: hp.Distillation(relations=1.0, relation_heads=0), "relation_heads is 0; expected a whole number, 1 or more"),
        (lambda: hp.recovery.RateRewind(1e-4, 0, 3), r"rate is 0\.0001; expected a function"),
        (lambda: hp.recovery.loss(MODEL, BATCHES[0], llama(), "logits"), r"distil is 'logits'; expected Distillation \("),
        (lambda: hp.recovery.quantise(None), A_MODULE),
        (lambda: hp.recovery.quantise(MODEL, "int4", group=0), "group is 0; expected a whole number, 1 or more"),
        (lambda: hp.recovery.compare_quantised(MODEL, None), r"models is LlamaForCausalLM\( \(model\): .*; expected a dict"),
        (lambda: hp.recovery.rewind_weights(MODEL, 3), r"source is 3; expected a torch\.nn\.Module .* or a path or a dict"),
        (lambda: hp.RecoverySettings(steps=-1), "steps is -1; expected more than 0"),
        (lambda: hp.RecoverySettings(method="lorra"), "unknown recovery method 'lorra'. Did you mean 'lora'"),
        (lambda: hp.RecoverySettings(last=0), "last is 0; expected .* above 0"),
        (lambda: hp.RecoverySettings(last=7), "last=7 is so many times the steps or minutes of a round; give one of them"),
        (lambda: hp.RecoverySettings(options={"distill": None}), "unknown option of recovery 'distill'. Did you mean 'distil'"),
        (lambda: hp.RecoverySettings(options={"learning_rate": 1e-3}), "does not read learning_rate .*; give lr"),
        (lambda: hp.RecoverySettings(options={"seed": 1}), "unknown option of recovery 'seed'"),
        (lambda: hp.one_shot(MODEL, BATCHES, 0.5), r"budget is 0\.5; expected Budget \(hp\.Budget"),
        (lambda: hp.one_shot(MODEL, BATCHES, HALF, metric=0.5), r"metric is 0\.5; expected a function or None"),
        (lambda: hp.one_shot(MODEL, BATCHES, HALF, trials=-1), "trials is -1; expected a whole number, 0 or more"),
        (lambda: hp.one_shot(MODEL, BATCHES, HALF, train=3), "train is 3; expected a list of batches"),
        (lambda: hp.one_shot(MODEL, BATCHES, HALF, recover="lora"), "recover is 'lora'; expected a function or None"),
        (lambda: hp.one_shot(MODEL, BATCHES, HALF, feed_forward=True, compensate=False), "feed_forward=True .* compensate=True"),
        (lambda: hp.iterative(MODEL, BATCHES, HALF, max_drop="2%"), "max_drop is '2%'; expected a number or None"),
        (lambda: hp.lottery_ticket(MODEL, BATCHES, HALF, recover=print, rewind_step=-1), "rewind_step is -1; expected a whole"),
        (lambda: hp.pruning_aware(MODEL, BATCHES, HALF, lr=float("nan")), "lr is nan; expected a number"),
        (lambda: hp.pruning_aware(MODEL, BATCHES, HALF, gate_lr=0.0), r"gate_lr is 0\.0; expected .*, above 0"),
        (lambda: hp.pruning_aware(MODEL, BATCHES, HALF, weight_decay=-1.0), r"weight_decay=-1\.0.*: expected .* 0 or more"),
        (lambda: hp.register_adapter(None), r"the adapter is None; expected an object with name.* CONTRIBUTING\.md"),
        (lambda: hp.nn.replace_multihead_attention(None), A_MODULE),
        (lambda: hp.nn.VariableHeadAttention("16", 4), "embed_dim is '16'; expected a whole number"),
        (lambda: hp.nn.VariableHeadAttention(16, 4, kdim=-1), "kdim is -1; expected a whole number, 1 or more"),
        (lambda: hp.nn.VariableHeadAttention(16, 4, dropout=2), "dropout is 2; expected the share to drop, 0 to 1"),
        (lambda: hp.nn.VariableHeadAttention(16, 4, head_map=[0, 1]), r"head_map is \[0, 1\]; expected HeadMap"),
        (lambda: hp.ops.attention(None, KEY, KEY), "query is None; expected a tensor"),
        (lambda: hp.ops.attention(QUERY, KEY, KEY, [0, 0, 1, 1]), r"head_map is \[0, 0, 1, 1\]; expected HeadMap \(HeadMap\("),
        (lambda: hp.ops.attention(QUERY, KEY, KEY, window=0.5), r"window is 0\.5; expected how many positions are seen"),
        (lambda: hp.ops.attention(QUERY, KEY, KEY, softcap=float("nan")), "softcap is nan; expected a finite number above 0"),
        (lambda: hp.ops.attention(QUERY, KEY, KEY, softcap=float("inf")), "softcap is inf; expected a finite number above 0"),
        (lambda: hp.ops.attention_varlen(*PACKED[:3], [0, 3, 5], STARTS), r"cu_seqlens_q is \[0, 3, 5\]; expected a tensor"),
        (lambda: hp.ops.attention_decode(QUERY[:, :, :1], KEY, KEY, 5), "lengths is 5; expected a tensor"),
        (lambda: hp.ops.scaled_dot_product_attention(KEY, KEY, KEY, "causal"), "attn_mask is 'causal'; expected a tensor"),
        (lambda: hp.ops.head_weight_stats(None), "weights is None; expected a list"),
    ],
)  # fmt: skip
def test_a_plain_mistake_is_named_with_what_was_expected(call, message):
    with pytest.raises(hp.InvalidInput, match=message):
        call()


def test_nothing_is_written_where_a_save_is_refused(tmp_path):
    target = tmp_path / "out"
    for act, message in (
        (lambda: hp.save(None, target), A_MODULE),
        (lambda: hp.save(MODEL, None), "folder is None; expected a path"),
        (lambda: hp.save(MODEL, target, tokenizer="bert-base"), "tokenizer or processor is 'bert-base'; expected the object"),
        (lambda: hp.save(MODEL, target, max_shard_sise="1GB"), "option of save .*Did you mean 'max_shard_size'"),
        (lambda: hp.prune_folder(None, PLAN, target), "source is None; expected a path"),
        (lambda: hp.prune_folder("m", PLAN, target, feed_forward=True), "give calibration="),
        (lambda: hp.recovery.store_logits(MODEL, BATCHES, target, top=0), "top is 0; expected a whole number, 1 or more"),
        (lambda: hp.recovery.store_logits(MODEL, BATCHES, target, temperature=0), "temperature is 0; expected more than 0"),
        (lambda: hp.recovery.store_logits(MODEL, 3, target), "batches is 3; expected a list of batches"),
        (lambda: hp.iterative(MODEL, BATCHES, HALF, steps=1, folder=target, spacing=[]), r"spacing is \[\]; expected a string"),
    ):  # fmt: skip
        with pytest.raises(hp.InvalidInput, match=message):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "reason"), [("a" * 10_000, "File name too long"), ("a\0b", "embedded null")])
@pytest.mark.parametrize(
    "call",
    [
        hp.load,
        hp.open_streamed,
        hp.HeadScores.load,
        hp.scoring.Observations.load,
        lambda path: hp.save(MODEL, path),
        lambda path: PLAN.save(path),
        lambda path: hp.recover(MODEL, BATCHES, teacher=path),
        lambda path: hp.one_shot(MODEL, BATCHES, HALF, folder=path),
        refuse_unwritable,
    ],
)
def test_a_path_that_no_file_can_have_is_refused(call, name, reason, tmp_path):
    with pytest.raises(hp.InvalidInput, match=f"which no file can be called: .*{reason}") as caught:
        call(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_options_that_a_load_cannot_use_are_refused(tmp_path):
    hp.save(MODEL, tmp_path / "model")
    with pytest.raises(hp.InvalidInput, match=r"load: .* argument 'devise_map'; expected options of from_pretrained"):
        hp.load(tmp_path / "model", devise_map="cpu")
    plain = nn.TransformerEncoderLayer(16, 4, 32)
    hp.save(plain, tmp_path / "plain")
    with pytest.raises(hp.InvalidInput, match="unknown option of load with model= 'dtype'"):
        hp.load(tmp_path / "plain", model=plain, dtype=torch.float32)
    with pytest.raises(hp.InvalidInput, match=r"the rate of h100 in int8; take dtype= out of bfloat16, float16"):
        hp.estimate(tmp_path / "model", HALF, device="h100", dtype=torch.int8)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (np.int64(3), int), (torch.tensor(3), int), (np.float32(0.5), float), (1, float), (np.bool_(True), bool), (0, bool),
        (Path("m"), str | Path), ("m", str | Path), ("cuda:0", torch.device | str), (torch.device("cpu"), torch.device | str),
        (iter(BATCHES), hints_of(hp.observe)["batches"]), (len, hints_of(hp.observe)["loss_fn"]),
        ({"fisher"}, hints_of(hp.score)["criterion"]),
    ],
)  # fmt: skip
def test_what_callers_do_give_is_taken(value, hint):
    assert fits(value, hint)


def test_every_public_annotation_can_be_checked():
    modules = (hp, hp.recovery, hp.schedules, hp.nn, hp.ops)
    public = {found for module in modules for name in module.__all__ if inspect.isfunction(found := getattr(module, name))}
    assert len(public) > 40
    for function in public:
        for hint in hints_of(function).values():
            fits(object(), hint)


def test_a_message_does_not_hold_the_error_that_it_stands_for():
    with pytest.raises(hp.InvalidInput) as caught:
        hp.ops.attention(None, KEY, KEY)
    assert caught.value.__suppress_context__


def test_a_right_call_is_left_alone_and_other_errors_stay():
    assert check_arguments(hp.plan, {"scores": SCORES, "budget": HALF, "min_heads": 1}) is None
    with pytest.raises(ZeroDivisionError):
        hp.score(MODEL, BATCHES, loss_fn=lambda model, batch: 1 / 0)
