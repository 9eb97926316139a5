import pytest
import torch
from tiny_models import bert, hidden, llama, padded, tokens

import headprune.models  # noqa: F401 (registers the attention)
from headprune.errors import InvalidInput


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_sdpa_gives(make, side):
    model, inputs = make(), padded(side=side)
    expected = hidden(model, **inputs)
    model.set_attn_implementation("headprune")
    assert torch.allclose(hidden(model, **inputs), expected, atol=1e-5)
    unmasked = hidden(model, input_ids=inputs["input_ids"])
    assert not torch.allclose(unmasked[1:], expected[1:], atol=1e-2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_tokens_of_sdpa(cache):
    model, inputs = llama(), padded(side="left")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("headprune")
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_prefill_in_chunks_equals_one_pass():
    model = llama()
    model.set_attn_implementation("headprune")
    ids = tokens(2, 12)
    whole = hidden(model, input_ids=ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], use_cache=True)
        second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-5)


def test_gradients_are_those_of_sdpa():
    gradients = []
    for implementation in ("sdpa", "headprune"):
        model = llama()
        model.set_attn_implementation(implementation)
        ids = tokens()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_attention_dropout_drops_in_training_and_not_in_evaluation():
    model = bert()
    model.config.attention_probs_dropout_prob = 0.5
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model.set_attn_implementation("headprune")
    inputs = padded(side="right")
    assert torch.equal(hidden(model, **inputs), hidden(model, **inputs))
    model.train()
    assert not torch.equal(hidden(model, **inputs), hidden(model, **inputs))


def test_a_paged_cache_is_refused():
    from headprune.models.attention_interface import headprune_attention

    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(InvalidInput, match="continuous batching"):
        headprune_attention(torch.nn.Module(), q, q, q, None, cache=object())
