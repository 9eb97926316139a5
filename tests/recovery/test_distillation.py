"""Each distillation loss against its formula, written out."""

import copy
import math

import pytest
import torch
from pruned_pairs import padded_batches, pruned_bert, pruned_classifier, pruned_llama, text_batches
from tiny_decoders import decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, tokens

import headprune as hp
from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.recovery.divergence import common_heads, squared_difference, top_divergence
from headprune.recovery.features import catching


def hidden_states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states[1:]


def masked_kl(expected, found, valid):
    """Mean over valid rows of KL, probabilities [batch, tokens, classes]."""
    rows = (expected * (expected.log() - found.log())).nan_to_num(0.0).sum(-1)
    return rows[valid].mean()


@torch.no_grad()
def test_logits_are_compared_as_hinton_does():
    dense, pruned = pruned_llama()
    batch, tau = text_batches()[0], 3.0
    expected = (dense(**batch).logits / tau).softmax(-1)
    found = (pruned(**batch).logits / tau).softmax(-1)
    by_hand = tau**2 * (expected * (expected / found).log()).sum(-1).mean()
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(logits=1.0, temperature=tau))
    torch.testing.assert_close(ours, by_hand)


@torch.no_grad()
def test_padding_does_not_count_in_logits():
    dense, pruned = pruned_llama()
    batch = padded_batches()[0]
    valid = batch["attention_mask"].bool()
    expected, found = dense(**batch).logits[valid].softmax(-1), pruned(**batch).logits[valid].softmax(-1)
    by_hand = (expected * (expected / found).log()).sum(-1).mean()
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(logits=1.0, temperature=1.0))
    torch.testing.assert_close(ours, by_hand)


@torch.no_grad()
@pytest.mark.parametrize("relative", [False, True])
def test_hidden_states_are_those_of_every_block(relative):
    dense, pruned = pruned_bert()
    batch = padded_batches()[0]
    valid = batch["attention_mask"].bool()
    layers = []
    for mine, theirs in zip(hidden_states(pruned, batch), hidden_states(dense, batch)):
        error = (mine - theirs)[valid].square().mean()
        layers.append(error / theirs[valid].square().mean() if relative else error)
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(hidden=1.0, relative=relative))
    torch.testing.assert_close(ours, torch.stack(layers).mean())


@torch.no_grad()
def test_attention_outputs_are_those_of_the_output_projections():
    dense, pruned = pruned_llama()
    batch = text_batches()[0]
    caught = {}
    for name, model in (("dense", dense), ("pruned", pruned)):
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(lambda _m, _a, out, name=name: caught.setdefault(name, []).append(out))
        model(**batch)
    by_hand = torch.stack([(mine - theirs).square().mean() for mine, theirs in zip(caught["pruned"], caught["dense"])]).mean()
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(attention=1.0, relative=False))
    torch.testing.assert_close(ours, by_hand)


@torch.no_grad()
def test_relations_are_minilmv2s():
    dense, pruned = pruned_bert()
    batch = padded_batches()[0]
    valid = batch["attention_mask"].bool()
    caught = {}
    for whose, model in (("dense", dense), ("pruned", pruned)):
        for role in ("query", "key", "value"):
            layer = getattr(model.encoder.layer[1].attention.self, role)
            layer.register_forward_hook(lambda _m, _a, out, at=(whose, role): caught.setdefault(at, out))
        model(**batch)
    heads, total = 4, torch.zeros(())
    for role in ("query", "key", "value"):
        relation = {}
        for whose in ("dense", "pruned"):
            states = caught[whose, role]
            width = states.shape[-1] // heads
            split = torch.stack([states[..., head * width : (head + 1) * width] for head in range(heads)])  # [heads, batch, ...]
            products = torch.einsum("hbik,hbjk->hbij", split, split) / math.sqrt(width)
            relation[whose] = products.masked_fill(~valid[None, :, None, :], float("-inf")).softmax(-1)
        total += torch.stack([masked_kl(relation["dense"][h], relation["pruned"][h], valid) for h in range(heads)]).mean()
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(relations=1.0, relation_heads=heads))
    torch.testing.assert_close(ours, total)


@torch.no_grad()
def test_embeddings_are_pooled_means():
    dense, pruned = pruned_bert()
    batch = padded_batches()[0]
    mask = batch["attention_mask"][..., None]
    mine, theirs = ((m(**batch).last_hidden_state * mask).sum(1) / mask.sum(1) for m in (pruned, dense))
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(embedding=1.0))
    torch.testing.assert_close(ours, (1 - torch.cosine_similarity(mine, theirs)).mean())


@torch.no_grad()
def test_similarities_are_those_inside_a_batch():
    dense, pruned = pruned_bert()
    batch = padded_batches()[0]
    first = lambda output, batch: output.last_hidden_state[:, 0]  # noqa: E731
    found = {}
    for whose, model in (("dense", dense), ("pruned", pruned)):
        rows = torch.nn.functional.normalize(first(model(**batch), batch), dim=-1)
        found[whose] = torch.stack(
            [torch.softmax(20 * torch.cat([rows[:i], rows[i + 1 :]]) @ rows[i], 0) for i in range(len(rows))]
        )
    by_hand = (found["dense"] * (found["dense"] / found["pruned"]).log()).sum(-1).mean()
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(similarity=1.0, embed=first))
    torch.testing.assert_close(ours, by_hand)


@torch.no_grad()
def test_terms_add_up_with_their_weights_and_the_task():
    dense, pruned = pruned_llama()
    batch = text_batches()[0]
    single = [hp.recovery.loss(pruned, batch, dense, hp.Distillation(**{name: 1.0})) for name in ("logits", "hidden")]
    both = hp.recovery.loss(pruned, batch, dense, hp.Distillation(logits=2.0, hidden=0.5, task=3.0))
    torch.testing.assert_close(both, 2 * single[0] + 0.5 * single[1] + 3 * pruned(**batch).loss)


def test_a_term_of_ones_own_counts():
    @hp.recovery.distillation_term("twice-for-tests")
    def twice(comparison):
        return 2 * comparison.student.outputs[0].logits.square().mean()

    dense, pruned = pruned_llama()
    batch = text_batches()[0]
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(more={"twice-for-tests": 0.25}))
    torch.testing.assert_close(ours, 0.5 * pruned(**batch).logits.square().mean())


def test_a_plain_module_is_taught_through_its_loss():
    dense, pruned, batches, loss_fn = pruned_classifier()
    ours = hp.recovery.loss(pruned, batches[0], dense, hp.Distillation(logits=1.0, hidden=1.0, temperature=1.0), loss_fn=loss_fn)
    expected, found = dense(batches[0][0]).softmax(-1), pruned(batches[0][0]).softmax(-1)
    kl = (expected * (expected / found).log()).sum(-1).mean()
    hidden = []
    for index in range(2):
        states = [
            model.encoder.layers[0](batches[0][0])
            if index == 0
            else model.encoder.layers[1](model.encoder.layers[0](batches[0][0]))
            for model in (pruned, dense)
        ]
        hidden.append((states[0] - states[1]).square().mean() / states[1].square().mean())
    torch.testing.assert_close(ours, kl + torch.stack(hidden).mean(), rtol=1e-4, atol=1e-6)
    ours.backward()
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert isinstance(dense.encoder.layers[0].self_attn, torch.nn.MultiheadAttention)


@pytest.mark.parametrize("top", [7, 40])
def test_all_classes_of_the_top_give_the_whole_divergence(top):
    """Against the definition: the classes that are not stored are one class."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = teacher.log_softmax(-1)
    chosen = expected.topk(top, dim=-1)
    found = student.float().log_softmax(-1).double()
    kept, mine = chosen.values.exp(), found.gather(-1, chosen.indices).exp()
    by_hand = (kept * (kept / mine).log()).sum(-1)
    if top < 40:
        rest, others = 1 - kept.sum(-1), 1 - mine.sum(-1)
        by_hand = by_hand + rest * (rest / others).log()
    ours = top_divergence(student, chosen.indices, chosen.values, 1.0)
    torch.testing.assert_close(ours.double(), by_hand, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_of_queries_with_gates_beside_them_the_queries_are_caught():
    model = decoder("qwen3_next")
    site, whole = attention_sites(model)[0], []
    site.module.q_proj.register_forward_hook(lambda _m, _a, out: whole.append(out))
    with catching(model, [site], {"query": [site.name]}) as found:
        model(torch.arange(1, 10)[None])
    queries = whole[0].view(1, 9, 4, 2, site.head_dim)[..., 0, :]  # heads, then query and gate
    assert torch.equal(found.query[site.name][0], queries.flatten(-2))


def test_relation_heads_divide_both_widths():
    assert common_heads(160, 384) == 8
    assert common_heads(32, 384) == 8
    assert common_heads(384, 384) == 12


def test_only_the_student_learns():
    dense, pruned = pruned_bert()
    hp.recovery.loss(pruned, padded_batches()[0], dense).backward()
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in pruned.parameters())
    assert not dense.training
    assert len(attention_sites(dense)) == 2


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: pruned_llama(layers=2)[0].model, "lacks the task head|no logits"),
        (lambda: with_vocabulary(77), "another vocabulary"),
        (lambda: pruned_bert()[0], "no logits"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(teacher, message):
    _, pruned = pruned_llama()
    with pytest.raises(InvalidInput, match=message):
        hp.recovery.loss(pruned, {"input_ids": text_batches()[0]["input_ids"]}, teacher(), hp.Distillation(logits=1.0))


def with_vocabulary(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = pruned_llama()[0]
    return LlamaForCausalLM(LlamaConfig(**{**dense.config.to_dict(), "vocab_size": size}))


SITE = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"embedding": 1.0}, r"has no last_hidden_state; give Distillation\(embed=\.\.\.\) or use logits"),
        ({"relations": 1.0, "relation_sites": ["model.layers.1.self_atn"]}, rf"unknown attention site .*Did you mean '{SITE}'"),
        ({"relations": 1.0, "relation_heads": 7}, f"{SITE}: relation_heads=7 does not divide the .* query features of the student"),
        ({"relations": 1.0, "relation_sites": [SITE]}, f"{SITE} has lost all its heads.*name other relation_sites"),
    ],
)
def test_terms_that_the_models_do_not_have_are_named(setting, message):
    dense, pruned = pruned_llama()
    if "lost" in message:
        hp.cut(pruned, {SITE: []})
    with pytest.raises(InvalidInput, match=message):
        hp.recovery.loss(pruned, text_batches()[0], dense, hp.Distillation(**setting))


def test_a_teacher_of_another_width_is_refused():
    _, pruned = pruned_llama()
    wide = decoder("llama", hidden_size=64)
    with pytest.raises(InvalidInput, match=r"the student gives \[.*, 32\], the teacher \[.*, 64\]; .* Use logits or relations"):
        hp.recovery.loss(pruned, text_batches()[0], wide, hp.Distillation(hidden=1.0))


def test_a_teacher_with_other_layers_is_refused():
    _, pruned = pruned_llama()
    with pytest.raises(InvalidInput, match=r"has no attention model\.layers\.1"):
        hp.recovery.loss(pruned, text_batches()[0], pruned_llama_of_one_layer(), hp.Distillation(hidden=1.0))


def pruned_llama_of_one_layer():
    from tiny_models import llama

    return llama(layers=1)


def test_weights_that_say_nothing_are_refused():
    with pytest.raises(InvalidInput, match="every weight is 0"):
        hp.Distillation()
    with pytest.raises(InvalidInput, match="expected more than 0"):
        hp.Distillation(logits=-1.0)
    with pytest.raises(InvalidInput, match="temperature is 0; expected more than 0"):
        hp.Distillation(logits=1.0, temperature=0)
    with pytest.raises(InvalidInput, match="unknown distillation term"):
        hp.Distillation(more={"logit": 1.0})


def test_a_relative_difference_is_over_the_teachers_mean_square():
    teacher, valid = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, dtype=torch.bool)
    assert float(squared_difference(3 * teacher, teacher, valid, relative=True)) == pytest.approx(4.0)


NUMBERS = [{"num_labels": 1}, {"num_labels": 3, "problem_type": "regression"}]


@torch.no_grad()
@pytest.mark.parametrize("options", NUMBERS)
def test_numbers_are_compared_by_their_square(options):
    dense, pruned = with_head(**options)
    batch = {"input_ids": tokens(4, 9)}
    ours = hp.recovery.loss(pruned, batch, dense)
    torch.testing.assert_close(ours, (pruned(**batch).logits - dense(**batch).logits).square().mean())


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 5])
def test_of_several_labels_each_is_compared_by_itself(number):
    dense, pruned = with_head(num_labels=number, problem_type="multi_label_classification")
    batch, tau = {"input_ids": tokens(4, 9)}, 3.0
    ours = hp.recovery.loss(pruned, batch, dense, hp.Distillation(logits=1.0, temperature=tau))
    found, expected = ((model(**batch).logits / tau).sigmoid() for model in (pruned, dense))
    true, false = expected * (expected / found).log(), (1 - expected) * ((1 - expected) / (1 - found)).log()
    torch.testing.assert_close(ours, tau**2 * (true + false).mean())


@torch.no_grad()
def test_labels_that_are_floats_make_it_several():
    """As transformers finds out by itself, at a head's first loss."""
    dense, pruned = with_head(num_labels=5)
    plain, multi = copy.deepcopy((dense, pruned)), with_head(num_labels=5, problem_type="multi_label_classification")
    batch = {"input_ids": tokens(4, 9)}
    labelled = {**batch, "labels": torch.ones(4, 5)}
    assert hp.recovery.loss(pruned, labelled, dense) == hp.recovery.loss(multi[1], batch, multi[0])
    assert hp.recovery.loss(plain[1], batch, plain[0]) != hp.recovery.loss(multi[1], batch, multi[0])


@pytest.mark.parametrize("options", [*NUMBERS, {"num_labels": 3, "problem_type": "multi_label_classification"}])
def test_a_teacher_of_numbers_or_several_labels_is_not_stored(options, tmp_path):
    batch = {"input_ids": tokens(4, 9)}
    dense, pruned = with_head(**options)
    with pytest.raises(InvalidInput, match="gives numbers or several labels at once, no classes to store"):
        hp.recovery.store_logits(dense, [batch], tmp_path / "none")
    if "problem_type" in options:  # as a folder that was written before its head was told
        dense.config.problem_type = None
        hp.recovery.store_logits(dense, [batch], tmp_path / "logits")
        with pytest.raises(InvalidInput, match="gives numbers or several labels at once, no classes to store"):
            hp.recovery.loss(pruned, batch, tmp_path / "logits")


def with_head(**options):
    """(dense, pruned), for sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig(**{**bert().config.to_dict(), **options})).eval()
    pruned = copy.deepcopy(dense)
    hp.cut(pruned, {"bert.encoder.layer.0.attention": [0]})
    return dense, pruned


@torch.no_grad()
@pytest.mark.parametrize("name", ["layoutlmv2", "layoutlmv3_seen", "prophetnet"])
def test_logits_are_of_words_where_attentions_run_more(name):
    """Places of a page's picture behind its words, or a stream for each word ahead. Padding does not count."""
    case = {**ENCODERS, **SEQ2SEQ}[name]
    dense, student, batch = case.make(), case.make(seed=1), case.batch("right")
    ours = hp.recovery.loss(student, batch, dense, hp.Distillation(logits=1.0, temperature=1.0))
    expected, found = dense(**batch).logits.softmax(-1), student(**batch).logits.softmax(-1)
    rows = (expected * (expected / found).log()).sum(-1)
    valid = batch["attention_mask"].bool() if name != "prophetnet" else batch["labels"] != -100
    assert rows.shape == valid.shape
    torch.testing.assert_close(ours, rows[valid].mean(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_classes_of_a_segmented_picture_are_compared_place_by_place():
    from transformers import MobileViTForSemanticSegmentation

    config = VISION["mobilevit"].make().config
    torch.manual_seed(0)
    dense, student = (MobileViTForSemanticSegmentation(config).eval() for _ in range(2))
    batch = {"pixel_values": VISION["mobilevit"].batch("right")["pixel_values"]}
    expected, found = (model(**batch).logits.softmax(dim=1) for model in (dense, student))
    ours = hp.recovery.loss(student, batch, dense, hp.Distillation(logits=1.0, temperature=1.0))
    torch.testing.assert_close(ours, (expected * (expected / found).log()).sum(dim=1).mean(), rtol=1e-4, atol=1e-7)


def test_a_loss_past_the_model_is_named():
    dense, pruned, batches, _ = pruned_classifier()
    past = lambda model, batch: model.head(model.encoder(batch[0]).mean(dim=1)).sum()  # noqa: E731
    with pytest.raises(InvalidInput, match=r"loss_fn does not call the model itself, .* no outputs to compare"):
        hp.recovery.loss(pruned, batches[0], dense, hp.Distillation(logits=1.0), loss_fn=past)


def test_projections_that_are_parameters_are_named():
    case = ENCODERS["xlnet"]
    dense, student, batch = case.make(), case.make(), case.batch("right")
    with pytest.raises(InvalidInput, match=r"rel_attn\.o of XLNet.* is a parameter, not a layer, so that attention is not seen"):
        hp.recovery.loss(student, batch, dense, hp.Distillation(attention=1.0))
    with pytest.raises(InvalidInput, match=r"holds its projections as parameters of its own.*method='full'"):
        hp.recover(student, [batch], method="projections", steps=1)
