"""The GPU benchmark of whole models, rehearsed on the CPU: it has to run the first time where there is a GPU."""

import math

import bench_gpu_whole_model
import torch
from bench_gpu_scoring import model_and_batches
from transformers import LlamaConfig
from versus import compare

TINY = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=64, max_position_embeddings=64,
)  # fmt: skip


def test_prefill_and_decode_give_a_row_each_and_leave_the_cache_as_long_as_it_was():
    dense, _ = model_and_batches(TINY, (1, 8), "cpu")
    rows = []
    bench_gpu_whole_model.prefill_and_decode(
        lambda name, ours, peers, **options: rows.append(compare(name, ours, peers, **options)), dense, 0.5, "cpu", 16, 16, 2
    )
    assert [row.name.split(",")[0] for row in rows] == ["GPU prefill", "GPU decode", "GPU decode in a CUDA graph"]
    assert all(math.isfinite(row.ratio) and row.peer == "dense" for row in rows)
    ids = torch.ones(2, 16, dtype=torch.long)
    cache = bench_gpu_whole_model.prefill(dense, ids)
    bench_gpu_whole_model.decode(dense, ids, cache)
    assert cache.get_seq_length() == 16


def test_the_bound_is_that_of_a_model_without_what_went():
    dense, _ = model_and_batches(TINY, (1, 8), "cpu")
    assert bench_gpu_whole_model.bound(dense, 0.0) == 1.0
    attention, feed_forward = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    assert bench_gpu_whole_model.bound(dense, 1.0) == (attention + feed_forward) / feed_forward
