"""Models with quantised weights are scored and evaluated as what those stand for, and not cut."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, tokens
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import headprune as hp
from headprune.errors import UnsupportedModel
from headprune.models.quantised import is_quantised, plain_weight, weight_shape

SIZES = {  # bitsandbytes scales 64 weights of a row together
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
}  # fmt: skip
BATCHES = [{"input_ids": rows, "labels": rows} for rows in tokens(24, 12).split(6)]
CRITERIA = ["fisher", "gate_gradient", "entropy", "fluctuation", "output_energy", "output_norm", "least_squares_by_head", "wanda"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def in_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def in_bitsandbytes(model: nn.Module, bits: int = 4) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            has_bias = layer.bias is not None
            if bits == 4:
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, has_bias, compute_dtype=torch.float32, quant_type="nf4"
                )
            else:
                new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_bias, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
            model.set_submodule(name, new.to("cpu"))
    return model.eval()


def in_eight_bits(model: nn.Module) -> nn.Module:
    return in_bitsandbytes(model, 8)


def dense_again(model: nn.Module, like: nn.Module) -> nn.Module:
    """`like` with the weights that those of `model` stand for."""
    plain = copy.deepcopy(like)
    for name, layer in model.named_modules():
        if is_quantised(layer):
            plain.get_submodule(name).weight.data = plain_weight(layer).float()
    return plain


@pytest.mark.parametrize(("quantise", "off"), [(in_torchao, 2e-3), (in_bitsandbytes, 2e-2)])  # the latter's kernels round more
def test_scores_are_those_of_the_weights_that_are_stood_for(quantise, off):
    dense = llama()
    model = quantise(copy.deepcopy(dense))
    with torch.no_grad():
        model(**BATCHES[0])  # bitsandbytes may pack its weights anew here
    again = dense_again(model, dense)
    changed = [(again.get_parameter(name) - weight).norm() / weight.norm() for name, weight in dense.named_parameters()]
    assert max(changed) > 1e-3
    with torch.no_grad():
        model(**BATCHES[0])
    found, expected = hp.score(model, BATCHES, CRITERIA), hp.score(again, BATCHES, CRITERIA)
    for criterion in CRITERIA:
        for name in expected[criterion]:
            torch.testing.assert_close(found[criterion][name], expected[criterion][name], rtol=off, atol=off / 100)
    with torch.no_grad():
        assert torch.allclose(model(**BATCHES[0]).logits, again(**BATCHES[0]).logits, rtol=off, atol=10 * off)


@pytest.mark.parametrize("quantise", [in_torchao, in_bitsandbytes, in_eight_bits])
def test_the_model_itself_is_pruned_by_the_scores_of_its_quantised_form(quantise):
    dense = llama()
    model = quantise(copy.deepcopy(dense))
    scores = hp.score(model, BATCHES, "output_energy")
    assert scores.compare(hp.score(dense, BATCHES, "output_energy")).spearman > 0.8
    plan = hp.plan(scores, hp.Budget(heads=0.5))
    assert hp.prune(dense, plan, BATCHES).savings.query_heads == (16, 8)
    for change in (lambda: hp.prune(model, plan), lambda: hp.cut(model, plan), lambda: hp.attention_sites(model)):
        with pytest.raises(
            UnsupportedModel, match=r"self_attn\.q_proj \(Linear.*\) holds quantised weights, .* prune the model before"
        ):
            change()
    with pytest.raises(
        UnsupportedModel, match=r"quantised weights, which cannot be measured themselves; choose a criterion of gates"
    ):
        hp.score(model, BATCHES, "magnitude_l2")


@pytest.mark.parametrize("quantise", [in_torchao, in_bitsandbytes])
def test_masks_and_costs_of_quantised_models(quantise):
    dense = bert()
    model = quantise(copy.deepcopy(dense))
    again = dense_again(model, dense)
    loss = lambda found, batch: found(**batch).last_hidden_state.square().mean(dim=(1, 2))  # noqa: E731
    batches = [{"input_ids": rows} for rows in tokens(6, 9).split(3)]
    found, expected = (hp.score(one, batches, "ablation", loss_fn=loss) for one in (model, again))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=1e-5)
    costs = [hp.evaluate(one, lambda _: 1.0, inputs=batches[0], repeats=1) for one in (model, again)]
    assert costs[0].attention_flops == costs[1].attention_flops
    assert costs[0].weight_bytes < costs[1].weight_bytes


@pytest.mark.parametrize("quantise", [in_torchao, in_bitsandbytes, in_eight_bits])
def test_shapes_are_those_of_the_weights_that_are_stood_for(quantise):
    layer = quantise(nn.Sequential(nn.Linear(64, 32)))[0]
    assert is_quantised(layer)
    assert weight_shape(layer) == tuple(plain_weight(layer).shape) == (32, 64)


@pytest.mark.parametrize("quantise", [in_torchao, in_bitsandbytes])
@pytest.mark.parametrize("term", ["logits", "hidden", "attention"])
def test_a_quantised_model_teaches(quantise, term):
    dense = llama()
    teacher = quantise(copy.deepcopy(dense))
    student = copy.deepcopy(dense)
    hp.cut(student, hp.PruningPlan.from_keep(student, {"model.layers.0.self_attn": [0, 3, 5]}))
    options = {"distil": hp.Distillation(**{term: 1.0}), "steps": 2, "lr": 0.0}
    lost = [
        hp.recover(copy.deepcopy(student), BATCHES, teacher=one, **options).losses[0][1]
        for one in (teacher, dense_again(teacher, dense))
    ]
    assert lost[0] == pytest.approx(lost[1], rel=5e-2)
    assert lost[0] > 0


def test_a_quantised_model_is_not_trained_and_adapters_of_peft_are_merged_into_the_model_itself(tmp_path):
    peft = pytest.importorskip("peft")
    dense = llama()
    hp.cut(dense, hp.PruningPlan.from_keep(dense, {"model.layers.1.self_attn": [0, 1, 2, 5]}))  # rows in steps of 32
    model = in_bitsandbytes(copy.deepcopy(dense))
    for method in ("full", "lora", "projections"):
        with pytest.raises(UnsupportedModel, match=r"q_proj holds quantised weights, which recovery does not train; .*peft"):
            hp.recover(model, BATCHES, method=method, steps=1)
    hp.save(dense, tmp_path / "pruned")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4)).train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for batch in BATCHES * 2:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path / "adapters")
    merged = peft.PeftModel.from_pretrained(hp.load(tmp_path / "pruned"), tmp_path / "adapters").merge_and_unload()
    hp.save(merged, tmp_path / "recovered")
    again = hp.load(tmp_path / "recovered")
    assert hp.attention_sites(again)[1].head_map.query_heads == 4
    losses = [sum(float(one(**batch).loss) for batch in BATCHES) for one in (dense, again)]
    assert losses[1] < losses[0]
