"""ProphetNet: streams of tokens that predict several tokens ahead, and relative positions that heads share by mistake."""

import copy

import pytest
import torch
import transformers
from tiny_encoders import PROPHETNET, SEQ2SEQ
from tiny_models import tokens

import headprune as hp
from headprune.models.prophetnet_forward import OwnNgram
from headprune.models.tokens import token_masks
from headprune.nn.replace import own_attention
from headprune.surgery.export.stock import stock_model

PLANS = {"some": [[0, 3], [2], [1, 2, 3], [0], [3], [1, 2]], "none in places": [[], [1], [], [0, 2], [2, 3], []]}


def make(ngram: int = 2) -> transformers.ProphetNetForConditionalGeneration:
    torch.manual_seed(0)
    config = transformers.ProphetNetConfig(**{**PROPHETNET, "ngram": ngram}, disable_ngram_loss=False)
    return transformers.ProphetNetForConditionalGeneration(config).eval()


def plan_for(model, heads: list[list[int]]) -> dict[str, list[int]]:
    return dict(zip((site.name for site in hp.attention_sites(model)), heads, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_all_streams_are_those_of_the_gated_model(ngram, plan):
    dense = make(ngram)
    pruned, keep = copy.deepcopy(dense), plan_for(dense, PLANS[plan])
    hp.cut(pruned, keep)
    batch = {name: value for name, value in SEQ2SEQ["prophetnet"].batch("right").items() if name != "labels"}
    batch |= {"decoder_input_ids": tokens(3, 6, seed=3), "output_attentions": True, "use_cache": False}
    with torch.no_grad():
        stock = dense(**batch)
        with hp.gated(dense, keep):
            expected = dense(**batch)
        found = pruned(**batch)
        with own_attention(dense):
            ours = dense(**batch)
    for name in ("logits", "logits_ngram")[: min(ngram, 2)]:
        assert torch.allclose(found[name], expected[name], atol=1e-5)
        assert torch.allclose(ours[name], stock[name], atol=1e-5)
        assert (stock[name] - expected[name]).abs().max() > 1e-2
    heads_of = {
        "encoder_attentions": (0, 1), "decoder_attentions": (2, 4), "decoder_ngram_attentions": (2, 4), "cross_attentions": (3, 5),
    }  # fmt: skip
    for field, places in heads_of.items():
        heads = [PLANS[plan][place] for place in places]
        for mine, whole, kept in zip(found[field], expected[field], heads, strict=True):
            assert torch.allclose(mine, whole.index_select(-3, torch.tensor(kept, dtype=torch.long)), atol=1e-5), field


@pytest.mark.parametrize("plan", PLANS)
def test_it_generates_as_gated(plan):
    dense = make()
    pruned, keep = copy.deepcopy(dense), plan_for(dense, PLANS[plan])
    hp.cut(pruned, keep)
    prompt = tokens(2, 5, seed=1)
    asked = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with hp.gated(dense, keep):
        expected = dense.generate(prompt, **asked)
    found = pruned.generate(prompt, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in zip(found.scores, expected.scores, strict=True))


def test_the_decoder_alone():
    torch.manual_seed(0)
    model = transformers.ProphetNetForCausalLM(
        transformers.ProphetNetConfig(**PROPHETNET, is_decoder=True, add_cross_attention=False)
    )
    model.eval()
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(tokens().shape, dtype=torch.long), "labels": tokens()}
    scores = hp.score(model, [batch], criterion="wanda")
    assert all(scores[site.name].min() > 0 for site in hp.attention_sites(model))
    keep = plan_for(model, [[1, 3], [0]])
    with torch.no_grad(), hp.gated(model, keep):
        expected = model(**batch).logits
    hp.cut(model, keep)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


def test_the_stock_forward_is_back_after_the_block():
    model = make()
    kinds = [type(module) for module in model.modules()]
    with own_attention(model):
        assert sum(isinstance(module, OwnNgram) for module in model.modules()) == 2
    assert [type(module) for module in model.modules()] == kinds


def test_pruning_with_compensation_and_the_way_back_to_the_unmodified_class():
    model, batch = make(), SEQ2SEQ["prophetnet"].batch("left")
    plan = hp.PruningPlan.from_keep(model, plan_for(model, PLANS["some"]))
    hp.prune(model, plan, calibration=[batch])
    dense, _ = stock_model(model)
    with torch.no_grad():
        assert torch.allclose(dense(**batch).logits, model(**batch).logits, atol=1e-4)


def test_padding_of_the_target_counts_in_no_stream():
    model, batch = make(), SEQ2SEQ["prophetnet"].batch("right")
    masks = {site.name: token_masks(model)(site.name, batch) for site in hp.attention_sites(model)}
    assert torch.equal(masks["prophetnet.encoder.layers.0.self_attn"], batch["attention_mask"])
    for name in ("self_attn", "cross_attn"):
        assert torch.equal(masks[f"prophetnet.decoder.layers.1.{name}"], torch.cat([batch["labels"] != -100] * 3, dim=1))
