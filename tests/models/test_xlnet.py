"""XLNet: heads in parameters, which are weights of linear layers only while heads are asked for."""

import copy

import pytest
import torch
import transformers
from tiny_encoders import ENCODERS

import headprune as hp
from headprune.models.xlnet_layers import PARTS
from headprune.nn.replace import own_attention
from headprune.scoring.movement import MovementRecorder
from headprune.surgery.export.stock import stock_model
from headprune.surgery.verify import cut_error

KEEP = [[0, 3], [2]]
STOCK = transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention


def make(seed: int = 0) -> transformers.XLNetForTokenClassification:
    return ENCODERS["xlnet"].make(seed=seed)


def plan_for(model, heads=KEEP) -> dict[str, list[int]]:
    return dict(zip((site.name for site in hp.attention_sites(model)), heads, strict=True))


def attentions(model) -> list:
    return [layer.rel_attn for layer in model.transformer.layer]


def logits(model, **more) -> torch.Tensor:
    batch = {name: value for name, value in ENCODERS["xlnet"].batch("right").items() if name != "labels"}
    with torch.no_grad():
        return model(**batch, **more).logits * batch["attention_mask"][..., None]


def test_the_model_is_the_stock_one_before_and_after():
    model = make()
    parameters, state, before = list(model.named_parameters()), list(model.state_dict()), logits(model)
    with own_attention(model):
        assert "transformer.layer.0.rel_attn.linear_q.weight" in model.state_dict()
        assert torch.allclose(logits(model), before, atol=1e-6)
        attentions(model)[0].linear_q.weight.data[:, 0] += 1.0
    assert not torch.allclose(logits(model), before, atol=1e-4), "what is written to a layer stays"
    assert list(model.state_dict()) == state
    assert all(new is old and key == name for (key, new), (name, old) in zip(model.named_parameters(), parameters, strict=True))
    assert {type(attention) for attention in attentions(model)} == {STOCK}


def test_a_cut_attention_is_a_stock_one_with_smaller_parameters():
    model = make()
    sites = hp.attention_sites(model)
    per_head = sites[0].parameters_per_head(False) + sites[0].parameters_per_head(True)
    before = sum(parameter.numel() for parameter in model.parameters())
    hp.cut(model, plan_for(model))
    assert {type(attention) for attention in attentions(model)} == {STOCK}
    assert [attention.k.shape for attention in attentions(model)] == [(32, 2, 8), (32, 1, 8)]
    assert [attention.seg_embed.shape for attention in attentions(model)] == [(2, 2, 8), (2, 1, 8)]
    assert before - sum(parameter.numel() for parameter in model.parameters()) == 5 * per_head


@pytest.mark.parametrize("keep", [KEEP, [[], [1, 2, 3]], [[1], []]])
def test_cutting_equals_gating_with_segments_memory_and_both_streams(keep):
    dense = make()
    pruned, plan = copy.deepcopy(dense), plan_for(dense, keep)
    hp.cut(pruned, plan)
    base = [dense.transformer, pruned.transformer]
    ids = torch.arange(1, 15).view(2, 7)
    with torch.no_grad(), hp.gated(dense, plan):
        memory = base[0](ids, use_mems=True).mems
        given = {
            "token_type_ids": (ids % 3 == 0).long(),
            "mems": memory,
            "perm_mask": (torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.6).float(),
            "target_mapping": torch.eye(7)[[2, 5]].expand(2, 2, 7),
            "output_attentions": True,
        }
        expected = base[0](ids, **given)
    with torch.no_grad():
        found = base[1](ids, **given)
    assert (found.last_hidden_state - expected.last_hidden_state).abs().max() <= 1e-5
    for mine, theirs, heads in zip(found.attentions, expected.attentions, keep, strict=True):
        for of_stream, of_dense in zip(mine, theirs, strict=True):
            assert torch.allclose(of_stream, of_dense[:, heads], atol=1e-6)


def test_it_generates_as_gated():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 50, "initializer_range": 0.4}
    dense = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes)).eval()
    pruned, plan = copy.deepcopy(dense), plan_for(dense)
    hp.cut(pruned, plan)
    asked = {"max_new_tokens": 6, "do_sample": False}
    with hp.gated(dense, plan):
        expected = dense.generate(torch.arange(1, 6)[None], **asked)
    assert torch.equal(pruned.generate(torch.arange(1, 6)[None], **asked), expected)


def test_gradients_reach_the_parameters_and_come_back():
    model, batch = make(), ENCODERS["xlnet"].batch("right")
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with own_attention(model):
        model(**batch).loss.backward()
    assert {f"transformer.layer.0.rel_attn.{part}" for part in PARTS} <= set(expected)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected)
        assert name not in expected or torch.allclose(parameter.grad, expected[name], atol=1e-5)


@pytest.mark.parametrize("criterion", ["magnitude_l2", "taylor_weight", "wanda", "regression"])
def test_criteria_of_weights_gradients_and_outputs_reach_every_head(criterion):
    model = make()
    parameters = list(model.parameters())
    scores = hp.score(model, [ENCODERS["xlnet"].batch("left")], criterion=criterion)
    assert all(torch.isfinite(scores[site.name]).all() and scores[site.name].any() for site in hp.attention_sites(model))
    assert all(new is old and new.grad is None for new, old in zip(model.parameters(), parameters, strict=True))


def test_attention_patterns_and_movement_are_refused_by_a_line():
    model = make()
    with pytest.raises(hp.InvalidInput, match="Choose a criterion of gradients or of outputs"):
        hp.score(model, [ENCODERS["xlnet"].batch("left")], criterion="entropy")
    with pytest.raises(hp.UnsupportedModel, match="score it by taylor_weight or fisher"):
        MovementRecorder(model)


def test_pruning_with_compensation():
    model = make()
    dense, batch = copy.deepcopy(model), ENCODERS["xlnet"].batch("left")
    plan = hp.PruningPlan.from_keep(model, plan_for(model))
    hp.prune(model, plan, calibration=[batch])
    plain = copy.deepcopy(dense)
    hp.cut(plain, plan)
    assert cut_error(dense, model, plan, logits) <= 1e-5
    off, without = ((logits(found) - logits(dense)).square().mean() for found in (model, plain))
    assert off < without


def test_the_unmodified_class_gets_dead_heads():
    model = make()
    hp.cut(model, plan_for(model))
    dense, _ = stock_model(model)
    assert attentions(dense)[0].q.shape == (32, 4, 8)
    assert torch.allclose(logits(dense), logits(model), atol=1e-5)


def test_trained_gates():
    model, batch = make(), ENCODERS["xlnet"].batch("right")
    reached = []

    def loss(model, batch):
        reached.append(all(hasattr(attention, "linear_o") for attention in attentions(model)))
        return model(**batch).loss

    found = hp.pruning_aware(model, [batch], hp.Budget(heads=0.5), steps=3, loss_fn=loss)
    assert all(reached[1:4]), "the gates stand before layers"
    assert {type(attention) for attention in attentions(found.model)} == {STOCK}


def test_on_disk_it_is_refused_by_a_line_and_estimated(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "dense")
    plan = hp.PruningPlan.from_keep(model, plan_for(model))
    with pytest.raises(hp.UnsupportedModel, match="in no linear layers; load the model whole to prune it"):
        hp.prune_folder(tmp_path / "dense", plan, tmp_path / "pruned")
    with pytest.raises(hp.UnsupportedModel, match="load the model whole instead of streaming it"):
        hp.open_streamed(tmp_path / "dense")
    found = hp.estimate(tmp_path / "dense", hp.Budget(heads=0.5))
    hp.cut(model, plan_for(model, [[0, 1], [2, 3]]))
    assert found.pruned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.pruned.flops_per_token < found.dense.flops_per_token
