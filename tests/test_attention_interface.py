import pytest
import torch
from tiny_models import bert, hidden, llama, padded, tokens
from transformers import (
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

from headprune.attention_interface import headprune_attention, headprune_mask
from headprune.errors import InvalidInput
from headprune.ops import watch
from headprune.surgery import cut


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


@pytest.mark.parametrize(
    ("kv_len", "position_bias"),
    [(5, None), (5, torch.arange(100.0).view(1, 4, 5, 5)), (8, None)],
    ids=["plain", "biased", "others' keys"],
)
def test_dropout_leaves_the_causal_order_as_it_is(kv_len, position_bias):
    module = torch.nn.Module().train()
    module.is_kv_shared_layer = kv_len > 5
    q, k, v = (torch.randn(2, heads, length, 8) for heads, length in ((4, 5), (2, kv_len), (2, kv_len)))
    found, expected = (
        headprune_attention(module, q, k, v, None, dropout=dropout, position_bias=position_bias)[0] for dropout in (1e-12, 0.0)
    )
    assert torch.allclose(found, expected, atol=1e-5)


SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4))


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=2.0))


def gpt_oss():
    model = GptOssForCausalLM(
        GptOssConfig(**SMALL, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, eos_token_id=None)
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def t5():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("make", [llama, mistral, gemma2, gpt_oss, t5])
def test_logits_and_beams_of_a_left_padded_batch_are_those_of_eager(make):
    """Sliding windows, soft caps, sinks, position biases: all that models hand over."""
    model, inputs = seeded(make), padded(side="left")
    extra = {"decoder_input_ids": tokens(3, 5)} if make is t5 else {}
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    found = []
    for implementation in ("eager", "headprune"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(**inputs, **extra).logits
        found.append((logits if extra else logits * inputs["attention_mask"][..., None], model.generate(**inputs, **options)))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-5)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("make", [llama, mistral, gemma2, gpt_oss])
def test_packed_sequences_give_what_each_gives_alone(make):
    model, sequences = seeded(make), [tokens(1, length, seed=length)[0] for length in (5, 3, 8)]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = torch.cat([model(input_ids=sequence[None]).logits[0] for sequence in sequences])
        model.set_attn_implementation("headprune")
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        batch = collator([{"input_ids": sequence.tolist()} for sequence in sequences])
        del batch["labels"]
        assert torch.allclose(model(**batch, use_cache=False).logits[0], expected, atol=2e-5)


def test_packed_sequences_refuse_what_they_cannot_carry():
    q, starts = torch.zeros(1, 2, 4, 8), torch.tensor([0, 1, 4])
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    module = torch.nn.Module()
    assert headprune_attention(module, q, q, q, None, **packed)[0].shape == (1, 4, 2, 8)
    cases = {
        "attention mask": {"attention_mask": torch.ones(1, 4).bool()},
        "position bias": {"position_bias": torch.zeros(1, 2, 4, 4)},
        "dropout": {"dropout": 0.1},
        "without cu_seq_lens_k": {"cu_seq_lens_k": None},
    }
    for name, change in cases.items():
        with pytest.raises(InvalidInput, match=name):
            headprune_attention(module, q, q, q, **{"attention_mask": None, **packed, **change})
    module.config = LlamaConfig(attention_chunk_size=4)
    with pytest.raises(InvalidInput, match="chunked"):
        headprune_attention(module, q, q, q, None, **packed)


def test_a_single_query_hands_its_padding_over_as_a_key_mask(monkeypatch):
    """A bias would keep decode kernels from running."""
    calls = []
    real = watch.attention
    monkeypatch.setattr(watch, "attention", lambda *a, **options: calls.append(options) or real(*a, **options))
    model, inputs = llama(), padded(side="left")
    model.set_attn_implementation("headprune")
    for cache in ("dynamic", "static"):
        calls.clear()
        model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation=cache, disable_compile=True)
        decoding = calls[2:]
        assert len(decoding) == 4
        assert all(call["bias"] is None and call["key_mask"].shape[0] == 3 and not call["causal"] for call in decoding)


def test_a_padded_decoder_forms_the_mask_that_sdpa_forms_and_no_more():
    ids = padded(side="left")
    shape = {"batch_size": 3, "q_length": 9, "kv_length": 9, "mask_function": causal_mask_function}
    padding = ids["attention_mask"].bool()
    assert torch.equal(headprune_mask(attention_mask=padding, **shape), sdpa_mask(attention_mask=padding, **shape))
    for unpadded in (None, torch.ones(3, 9).bool()):
        assert headprune_mask(attention_mask=unpadded, **shape) is None


def test_a_ragged_decoder_compiles_whole_with_a_static_cache():
    model, inputs = llama(layers=1), padded(side="left")
    cut(model, {"model.layers.0.self_attn": [0, 1, 2, 5]})
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**inputs, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_ragged_decoder_exports():
    model, inputs = llama(), padded(side="left")
    cut(model, {"model.layers.0.self_attn": [0, 1, 2, 5]})
    model.config.use_cache = False
    exported = torch.export.export(model, (), kwargs=inputs, strict=False)
    assert "headprune.attention" in str(exported.graph)
    assert torch.allclose(exported.module()(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_what_may_change_the_result_and_is_unknown_is_refused_by_name():
    model = llama()
    model.set_attn_implementation("headprune")
    with pytest.raises(InvalidInput, match="block_indices"):
        model(input_ids=tokens(), block_indices=torch.zeros(1))
    with pytest.raises(InvalidInput, match="output_attentions"):
        model(input_ids=tokens(), output_attentions=True)
    assert model(input_ids=tokens(), block_indices=None, output_attentions=False, num_items_in_batch=3).logits.isfinite().all()


def test_a_paged_cache_is_refused():
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(InvalidInput, match="continuous batching"):
        headprune_attention(torch.nn.Module(), q, q, q, None, cache=object())
