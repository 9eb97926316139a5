"""Every compared method on tiny models: it removes what was asked, and its pattern outlives the fine-tune."""

import copy
import importlib.util

import pytest
import torch
from next_token import NextToken
from small_states import SmallStates
from tiny_decoders import decoder
from tiny_models import bert, llama
from torch import nn

import headprune as hp
from headprune.comparison import Compressed, Refused, Subject, comparison_methods
from headprune.comparison.masks import held
from headprune.comparison.sizes import bitmask_bits, compact_bytes, file_bytes, nonzero_parameters, two_of_four_bits
from headprune.recovery.methods import linear_layers
from headprune.surgery.savings import count_parameters

KEEP = {
    "bert": {"encoder.layer.0.attention": [0, 2], "encoder.layer.1.attention": [3]},
    "llama": {"model.layers.0.self_attn": [0, 2, 3, 7], "model.layers.1.self_attn": [1, 4, 5]},
}
needs_torch_pruning = pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is missing")


def subject_of(model, task, keep) -> Subject:
    plan = hp.PruningPlan.from_keep(model, keep)
    return Subject(model, task, plan, plan.removed_parameters, task.calibration)


@pytest.fixture(params=["bert", "llama"])
def subject(request):
    model, task = (bert(), SmallStates()) if request.param == "bert" else (llama(), NextToken())
    return subject_of(model, task, KEEP[request.param])


def compressed(name, subject):
    before = copy.deepcopy(subject.model.state_dict())
    found = comparison_methods()[name].compress(subject)
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())
    return found


def gone(found, subject) -> int:
    return count_parameters(subject.model) - count_parameters(found.model)


def tuned(found, subject):
    before = [parameter.detach().clone() for parameter in found.model.parameters()]
    with held(found.model, found.masks):
        hp.recover(found.model, subject.calibration, loss_fn=subject.task.loss, steps=3, lr=1e-2)
    assert any(not torch.equal(one, other) for one, other in zip(before, found.model.parameters()))


@pytest.mark.parametrize("name", ["heads", "heads-plain"])
def test_heads_go_as_the_plan_says(subject, name):
    found = compressed(name, subject)
    assert gone(found, subject) == subject.removed
    assert {site.name: site.head_map.query_heads for site in hp.attention_sites(found.model)} == {
        name: len(heads) for name, heads in subject.plan.items()
    }


def test_unstructured_zeros_are_as_many_as_asked_for_the_smallest_and_stay(subject):
    found = compressed("unstructured", subject)
    dense = {name: subject.model.get_submodule(name).weight for name in linear_layers(subject.model)}
    assert gone(found, subject) == 0
    assert nonzero_parameters(subject.model) - nonzero_parameters(found.model) == subject.removed
    zeroed = torch.cat([dense[name][~mask].abs() for name, mask in found.masks.items()])
    stay = torch.cat([dense[name][mask].abs() for name, mask in found.masks.items()])
    assert zeroed.max() <= stay.min()
    tuned(found, subject)
    assert all(not found.model.get_submodule(name).weight[~mask].any() for name, mask in found.masks.items())
    assert "weight_mask" not in str(list(found.model.state_dict()))


@pytest.mark.parametrize(("name", "block"), [("semi-structured", 4), ("four-of-eight", 8)])
def test_half_of_every_block_of_weights_is_zero_before_and_after_the_fine_tune(subject, name, block):
    found = compressed(name, subject)
    chosen = {name: found.model.get_submodule(name) for name in found.masks}
    smallest = min(module.weight.numel() for module in chosen.values()) // 2
    zeroed = sum(int((~mask).sum()) for mask in found.masks.values())
    assert subject.removed - smallest < zeroed <= subject.removed
    tuned(found, subject)
    for module in chosen.values():
        assert type(module) is torch.nn.Linear
        assert ((module.weight.view(-1, block) != 0).sum(dim=1) == block // 2).all()
    dense = subject.model.get_submodule(next(iter(chosen))).weight.view(-1, block)
    mask = found.masks[next(iter(chosen))].view(-1, block)
    assert (dense.abs().masked_fill(mask, 0).amax(dim=1) <= dense.abs().masked_fill(~mask, torch.inf).amin(dim=1)).all()


@needs_torch_pruning
def test_channels_go_up_to_the_last_one_that_fits(subject):
    found = compressed("channels", subject)
    kind = type(subject.model).__name__
    cost = 3 * 32 if kind.startswith("Llama") else 2 * 32 + 1
    assert subject.removed - cost < gone(found, subject) <= subject.removed
    heads = [site.head_map for site in hp.attention_sites(subject.model)]
    assert [site.head_map for site in hp.attention_sites(found.model)] == heads
    assert found.model.config._attn_implementation == subject.model.config._attn_implementation
    tuned(found, subject)


@needs_torch_pruning
def test_a_channel_that_gives_nothing_goes_first_and_costs_nothing():
    model = bert()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[:, 7:20] = 0
    task = SmallStates()
    found = compressed("channels", Subject(model, task, None, 13 * 65, task.calibration))
    assert torch.allclose(task.outputs(found.model), task.outputs(model), atol=1e-5)
    assert found.model.encoder.layer[1].output.dense.in_features == 35


@pytest.mark.parametrize("name", ["layers", "distilled"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_student_is_the_dense_model_without_some_layers(name, family):
    model, task = (bert(layers=4), SmallStates()) if family == "bert" else (llama(layers=4), NextToken())
    stack = model.encoder.layer if family == "bert" else model.model.layers
    size = sum(parameter.numel() for parameter in stack[0].parameters())
    found = compressed(name, Subject(model, task, None, int(1.2 * size), task.calibration))
    assert count_parameters(model) - count_parameters(found.model) == size
    kept = found.model.encoder.layer if family == "bert" else found.model.model.layers
    for one, other in zip(kept, (stack[0], stack[2], stack[3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert found.model.config.num_hidden_layers == 3
    assert (found.teaches is not None) == (name == "distilled")
    if family == "llama":  # a cache has as many layers as the model
        made = found.model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 5)


@pytest.mark.parametrize("form", ["int8", "int4", "w8a8"])
def test_quantised_rows_say_what_is_missing_or_quantise(subject, form):
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(Refused, match="headprune\\[quantise\\]"):
            compressed(form, subject)
        return
    found = compressed(form, subject)
    assert found.form == form
    assert nonzero_parameters(found.model) is None
    assert found.compact_bytes < file_bytes(subject.model)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_model_of_which_no_layer_is_rounded_has_no_row_of_rounded_weights(form):
    """It was the dense model under another name."""
    pytest.importorskip("torchao")
    with pytest.raises(Refused, match=f"none of its linear layers can be rounded to {form}: it is a Conv1D"):
        compressed(form, subject_of(decoder("gpt2"), NextToken(), {"transformer.h.0.attn": [0, 2]}))


def test_a_pattern_that_fits_no_layer_says_so():
    with pytest.raises(Refused, match="2:4 fits none of its linear layers: they are Conv1D"):
        compressed("semi-structured", subject_of(decoder("gpt2"), NextToken(), {"transformer.h.0.attn": [0, 2]}))


@pytest.mark.parametrize(
    ("name", "removed", "reason"),
    [
        ("unstructured", 10**6, "the linear layers have"),
        ("semi-structured", 10**6, "2:4 can take"),
        ("semi-structured", 3, "at least"),
        ("four-of-eight", 10**6, "4:8 can take"),
        ("layers", 10, "of its 2 layers"),
        ("layers", 10**6, "of its 2 layers"),
        pytest.param("channels", 10**6, "can spare", marks=needs_torch_pruning),
    ],
)
def test_what_cannot_be_removed_is_refused_with_the_number(subject, name, removed, reason):
    with pytest.raises(Refused, match=reason):
        comparison_methods()[name].compress(Subject(subject.model, subject.task, subject.plan, removed, subject.calibration))


def test_sparse_forms_are_counted_by_the_bit(subject):
    mask = torch.tensor([[True, True, False, False], [False, True, True, False]])
    assert bitmask_bits(mask, 32) == 8 + 4 * 32
    assert two_of_four_bits(mask, 16) == 4 * 18
    found = compressed("semi-structured", subject)
    zeroed = sum(int((~mask).sum()) for mask in found.masks.values())  # 4 bytes each; as many stay, with 2 bits
    assert compact_bytes(found, file_bytes(found.model)) == file_bytes(found.model) - 4 * zeroed + zeroed // 4


def test_the_least_form_is_the_file_where_a_bitmask_costs_more_than_it_saves():
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[0, :3] = False
    whole = file_bytes(model)
    assert compact_bytes(Compressed(model, masks={"0": mask}, stored_bits=bitmask_bits), whole) == whole
    mask[:32] = False
    assert compact_bytes(Compressed(model, masks={"0": mask}, stored_bits=bitmask_bits), whole) < whole
