"""Compiled code does not know of hooks that came later: gates would change nothing, and states could not be seen."""

import copy

import pytest
import torch
from tiny_models import llama, tokens

from headprune.models import attention_sites, gated
from headprune.surgery import cut
from headprune.surgery.compensate import resolve_outputs


def whole(model):
    return torch.compile(model, backend="eager")


def layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole, layers, forward])
@torch.no_grad()
def test_a_compiled_model_is_gated_re_solved_and_cut_as_one_that_is_not(compiled):
    plain = llama(layers=2)
    model, batches = compiled(copy.deepcopy(plain)), [{"input_ids": tokens(4, 12, seed)} for seed in range(6)]
    model(**batches[0])
    keep, expected = ({site.name: [0, 1, 5] for site in attention_sites(one)} for one in (model, plain))
    with gated(model, keep), gated(plain, expected):
        torch.testing.assert_close(model(**batches[0]).logits, plain(**batches[0]).logits)
    found = resolve_outputs(model, attention_sites(model), keep, batches)
    by_hand = resolve_outputs(plain, attention_sites(plain), expected, batches)
    assert [one.error_after for one in found] == pytest.approx([one.error_after for one in by_hand], rel=1e-4)
    cut(model, keep)
    cut(plain, expected)
    torch.testing.assert_close(model(**batches[0]).logits, plain(**batches[0]).logits, rtol=1e-4, atol=1e-4)
