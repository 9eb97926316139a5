"""Decoding a ragged model in a CUDA graph."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from headprune.surgery import cut

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KEYS = 600  # long enough for the decode kernels


def ragged_decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        vocab_size=97, initializer_range=0.1,  # with the usual 0.02 heads hardly look at one token more than at another
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().to(torch.bfloat16).eval()
    cut(model, {"model.layers.0.self_attn": [0, 2, 3, 7], "model.layers.1.self_attn": [1, 4, 5]})
    model.set_attn_implementation("headprune")
    return model


@torch.no_grad()
def test_a_decode_step_replays_with_the_tokens_and_the_cache_of_each_step():
    model, ids = ragged_decoder(), torch.randint(97, (2, KEYS), device="cuda")
    steps = torch.randint(97, (4, 2, 1), device="cuda")
    expected = [model(input_ids=torch.cat([ids, *steps[: count + 1]], 1)).logits[:, -1] for count in range(4)]
    forgetful = [model(input_ids=torch.cat([ids, steps[count]], 1)).logits[:, -1] for count in range(4)]
    assert all(float((one - other).abs().max()) > 1 for one, other in zip(expected[1:], forgetful[1:]))  # twice what is allowed
    cache = StaticCache(config=model.config, max_cache_len=KEYS + 16)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    token = steps[0].clone()

    def step():
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for layer in cache.layers:
        layer.cumulative_length.fill_(KEYS)
    for count in range(4):
        token.copy_(steps[count])
        graph.replay()
        torch.testing.assert_close(logits, expected[count], rtol=0, atol=0.5)
