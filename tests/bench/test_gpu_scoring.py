"""The GPU benchmark of scoring, rehearsed on the CPU: it has to run the first time where there is a GPU."""

import math

import bench_gpu_scoring
import pytest
import torch
from scoring_peers import head_mask_backward, plain_backward
from transformers import LlamaConfig
from versus import compare

TINY = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=64, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def tiny():
    return bench_gpu_scoring.model_and_batches(TINY, (2, 16), "cpu")


@pytest.mark.parametrize("ours", [bench_gpu_scoring.scores_and_statistics, bench_gpu_scoring.scores_alone])
@pytest.mark.parametrize("peer", [plain_backward, head_mask_backward])
def test_a_row_has_times_and_peak_memory_of_both(tiny, ours, peer):
    row = compare("row", lambda: ours(*tiny), {"peer": lambda: peer(*tiny)}, rounds=2, memory=True, graphs=False)
    assert math.isfinite(row.ratio)
    assert set(row.peak_mb) == {"ours", "peer"}
    assert all(peak > 0 for peak in row.peak_mb.values())


def test_the_model_is_bf16_and_gets_finite_scores_for_every_head(tiny):
    model, batches = tiny
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    scores = bench_gpu_scoring.scores_and_statistics(model, batches)
    assert set(scores) == {"gate_gradient", "fisher", "entropy"}
    for found in scores.values():
        assert all(len(heads) == 4 and heads.isfinite().all() for heads in found.values())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_peers_leave_no_hook_and_no_gradient_behind(tiny):
    model, batches = tiny
    for peer in (plain_backward, head_mask_backward):
        peer(model, batches)
        assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
