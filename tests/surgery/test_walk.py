"""Steps through a forward pass: the same values as whole passes, in every kind of model, and each layer run once."""

from collections import Counter

import pytest
import tiny_decoders
import torch
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, llama, tokens
from torch import nn

from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.surgery.walk import Walk, keeping_for

OTHERS = {**ENCODERS, **SEQ2SEQ, **VISION}
DECODERS = ["gpt2", "gpt_neox", "bloom", "falcon_gqa", "mixtral", "gemma3", "gpt_oss", "deepseek_v3", "gemma4_shared"]
CHOSEN = ["bert", "deberta_v3", "modernbert", "t5", "whisper", "swin", "clip", "vit"]


def in_order(model, run) -> list:
    """The sites that a pass reaches, in the order reached."""
    sites, reached = attention_sites(model), []
    handles = [site.output.module.register_forward_pre_hook(lambda *_, site=site: reached.append(site)) for site in sites]
    run()
    for handle in handles:
        handle.remove()
    return reached


def check_steps(model, batch) -> None:
    run = lambda: model(**batch)  # noqa: E731
    with torch.no_grad():
        sites = in_order(model, run)
        keeping = keeping_for(model, run, sites)
        assert keeping != "nothing"
        walk = Walk(model, run, keeping)
        for site in sites:
            found, expected = walk.to(site, site.module)[0], Walk(model, run, "nothing").to(site, site.module)[0]
            assert torch.equal(found, expected), site.name


@pytest.mark.parametrize("family", DECODERS)
def test_steps_give_what_whole_passes_give_in_decoders(family):
    check_steps(tiny_decoders.decoder(family), {"input_ids": tokens()})


@pytest.mark.parametrize("family", CHOSEN)
def test_steps_give_what_whole_passes_give_in_other_models(family):
    check_steps(OTHERS[family].make(), OTHERS[family].batch("right"))


@pytest.mark.parametrize("make", [llama, bert])
def test_each_layer_is_run_once_and_only_the_last_result_of_a_stack_is_kept(make):
    model, calls = make(layers=5), Counter()
    layers = model.model.layers if hasattr(model, "model") else model.encoder.layer
    for number, layer in enumerate(layers):
        feed_forward = layer.mlp if hasattr(layer, "mlp") else layer.intermediate
        forward = feed_forward.forward
        feed_forward.forward = lambda *args, forward=forward, number=number: (calls.update([number]), forward(*args))[1]
    walk = Walk(model, lambda: model(input_ids=tokens()), "last")
    with torch.no_grad():
        for site in attention_sites(model):
            walk.to(site, None)
    assert calls == Counter({0: 1, 1: 1, 2: 1, 3: 1})  # no step goes beyond the last attention
    kept = [call.result for call in walk._finished if call.module in set(layers)]
    sizes = [(one[0] if isinstance(one, tuple) else one).untyped_storage().nbytes() for one in kept]
    assert len(sizes) == 4
    assert max(sizes[:3]) <= 8 < sizes[3]


class Skipping(nn.Module):
    """The result of the first layer is read again behind the second, as in a U-Net."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.stack = nn.ModuleList(bert(layers=1, seed=seed).encoder.layer[0] for seed in range(4))
        self.in_place = in_place

    def forward(self, states):
        first = self.stack[0](states)
        second = self.stack[1](first)
        if self.in_place:
            second += first
        else:
            second = second + first
        return self.stack[3](self.stack[2](second))


@pytest.mark.parametrize(("in_place", "keeping"), [(False, "all"), (True, "nothing")])
def test_results_that_are_read_again_or_changed_in_place_are_noticed(in_place, keeping):
    model, states = Skipping(in_place).eval(), torch.randn(2, 5, 32)
    sites = attention_sites(model)
    assert keeping_for(model, lambda: model(states), sites) == keeping
    walk = Walk(model, lambda: model(states), keeping)
    with torch.no_grad():
        for site in sites:
            assert torch.equal(walk.to(site, None)[0], Walk(model, lambda: model(states), "nothing").to(site, None)[0])


class Pooling(nn.Module):
    """What it gives is made of a state in the middle; with in_place, what it was given is changed."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.stack = nn.ModuleList(bert(layers=1, seed=seed).encoder.layer[0] for seed in range(3))
        self.in_place = in_place

    def forward(self, states):
        begun = self.first(states + 0)
        middle = self.stack[0](begun)
        last = self.stack[2](self.stack[1](middle))
        return begun.add_(last) if self.in_place else middle + last


@pytest.mark.parametrize(("in_place", "keeping"), [(False, "all"), (True, "nothing")])
def test_what_is_read_or_changed_behind_the_last_attention_is_noticed(in_place, keeping):
    model, states = Pooling(in_place).eval(), torch.randn(2, 5, 32)
    sites = attention_sites(model)
    assert keeping_for(model, lambda: model(states), sites) == keeping
    walk = Walk(model, lambda: model(states), keeping)
    with torch.no_grad():
        walk.to(sites[-1], None)
        for _ in range(2):
            assert torch.equal(walk.copy().end(), model(states))


def test_a_step_back_starts_again_and_an_attention_that_is_not_reached_is_named():
    model = llama(layers=3)
    first, _, last = attention_sites(model)
    walk = Walk(model, lambda: model(input_ids=tokens()), "all")
    with torch.no_grad():
        walk.to(last, None)
        found, _ = walk.to(first, None)
        assert torch.equal(found, Walk(model, walk.run, "nothing").to(first, None)[0])
        with pytest.raises(InvalidInput, match=r"model\.layers\.2\.self_attn was not reached"):
            Walk(model, lambda: model.model.embed_tokens(tokens())).to(last, None)
