import copy

import pytest
from tiny_models import bert, hidden, llama, padded
from torch import nn

from headprune.models import attention_sites
from headprune.models.stream import residual_streams


class Around(nn.Module):
    """An attention whose result is halved before it meets the stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output, *rest = self.inner(*args, **kwargs)
        return (0.5 * output, *rest)


@pytest.mark.parametrize(("make", "where"), [(bert, "encoder.layer.{}.attention"), (llama, "model.layers.{}")])
def test_each_family_adds_to_its_own_stream(make, where):
    model, inputs = make(), padded()
    found = residual_streams(model, attention_sites(model), lambda: hidden(model, **inputs))
    names = {module: name for name, module in model.named_modules()}
    assert [names[module] for module in found.values()] == [where.format(0), where.format(1)]
    assert list(found) == [site.name for site in attention_sites(model)]


def test_a_sum_that_is_never_formed_is_not_found():
    model, inputs = llama(), padded()
    sites = attention_sites(model)
    layer = model.model.layers[0]
    layer.self_attn = Around(layer.self_attn)
    found = residual_streams(model, sites[1:], lambda: hidden(model, **inputs))
    assert list(found) == ["model.layers.1.self_attn"]
    sites = [copy.copy(sites[0])]
    object.__setattr__(sites[0], "name", "model.layers.0.self_attn.inner")
    assert residual_streams(model, sites, lambda: hidden(model, **inputs)) == {}


def test_no_hook_stays_behind():
    model, inputs = bert(), padded()
    residual_streams(model, attention_sites(model), lambda: hidden(model, **inputs))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
