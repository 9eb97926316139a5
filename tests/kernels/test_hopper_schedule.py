"""The warp-specialised kernel's schedule and barrier protocol, without a GPU: its own functions run on a model of the barriers."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="Triton is not installed")

from hopper_model import Deadlock, ModelKernel, Race

from headprune.head_map import HeadMap
from headprune.kernels import attention_forward_hopper as kernel
from headprune.kernels import hopper_launch as launch
from headprune.kernels import hopper_schedule as schedule
from headprune.kernels.head_statistics import empty_partials
from headprune.ops import reference
from headprune.ops.call import AttentionCall

RAGGED = (0, 0, 1)


@pytest.fixture(autouse=True)
def one_thread():
    """The model's tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(
    monkeypatch,
    *,
    q_len,
    kv_len,
    causal,
    heads=RAGGED,
    gate=None,
    tiles=(16, 2, 2, 2),
    programs=2,
    seed=0,
    changes=None,
    stats=None,
):
    """(output, lse, query, keys and values expanded to the query heads) of the kernel on the model; fills stats."""
    torch.manual_seed(seed)
    make = lambda number, length: torch.randn(2, length, number, 64).to(torch.bfloat16).transpose(1, 2)  # noqa: E731
    query, key, value = make(len(heads), q_len), make(heads[-1] + 1, kv_len), make(heads[-1] + 1, kv_len)
    output, lse = torch.full_like(query, float("nan")), torch.full(query.shape[:3], float("nan"))
    model = ModelKernel(kernel, "attention_forward_hopper_kernel", seed, changes)
    monkeypatch.setattr(launch, "attention_forward_hopper_kernel", model)
    monkeypatch.setattr(launch, "empty_partials", lambda *sizes: torch.full_like(empty_partials(*sizes), float("nan")))
    launches = launch.hopper_launches(
        query, key, value, output, lse, heads, causal=causal, scale=0.2, gate=gate, stats=stats, tiles=launch.Tiles(*tiles),
        programs=programs,
    )  # fmt: skip
    launches[0].run()
    if stats is not None:
        add_up(launches[1].arguments["partial_ptr"], stats)
    return output, lse, query, key[:, list(heads)], value[:, list(heads)]


def add_up(partials, stats):
    """What head_statistics_kernel does."""
    entropy, top, max_prob, first, distance, norm, rows = partials
    sums = [field.sum(-1) / rows.sum(-1).clamp(min=1) for field in (entropy, max_prob, first, distance, norm)]
    stats.copy_(torch.stack([*sums[:2], top.amax(-1), *sums[2:]]))


@pytest.mark.parametrize(
    ("q_len", "kv_len", "causal"),
    [(1, 1, False), (70, 16, False), (129, 48, False), (64, 83, True), (130, 130, True), (3, 80, True), (300, 40, True)],
)
@pytest.mark.parametrize("tiles", [(16, 2, 2, 2), (32, 3, 3, 2), (16, 3, 2, 3)])
def test_every_order_of_events_gives_attention_without_race_or_deadlock(monkeypatch, q_len, kv_len, causal, tiles):
    for seed in range(2):
        torch.manual_seed(seed)
        gate = torch.rand(2, len(RAGGED))
        gate[0, 1] = gate[1, 2] = 0.0
        output, lse, *inputs = run(
            monkeypatch, q_len=q_len, kv_len=kv_len, causal=causal, gate=gate, tiles=tiles, programs=2 + seed, seed=seed
        )
        q, k, v = (tensor.double() for tensor in inputs)
        scores = (q @ k.transpose(2, 3)) * 0.2
        visible = torch.ones(q_len, kv_len).tril(kv_len - q_len).bool() if causal else torch.ones(q_len, kv_len).bool()
        scores = scores.masked_fill(~visible, float("-inf"))
        exact = scores.softmax(3) @ v * gate.double()[..., None, None]
        theirs = F.scaled_dot_product_attention(*inputs, attn_mask=visible, scale=0.2) * gate[..., None, None]
        exact, theirs = exact.nan_to_num(0.0), theirs.nan_to_num(0.0)  # rows without a key
        assert (output - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 4 * torch.finfo(torch.bfloat16).eps
        on = gate != 0
        assert torch.allclose(lse[on].double(), scores.logsumexp(3)[on], atol=1e-3)
        assert (output[~on] == 0).all()
        assert (lse[~on] == float("-inf")).all()


@pytest.mark.parametrize(
    ("q_len", "kv_len", "causal"),
    [(1, 1, False), (70, 16, False), (129, 300, False), (200, 83, False), (130, 130, True), (3, 80, True), (300, 40, True)],
)
def test_the_statistics_are_those_of_the_reference(monkeypatch, q_len, kv_len, causal):
    gate = torch.rand(2, len(RAGGED))
    gate[0, 1] = gate[1, 2] = 0.0
    stats = torch.empty(6, 2, len(RAGGED))
    _, _, query, key, value = run(
        monkeypatch, q_len=q_len, kv_len=kv_len, causal=causal, gate=gate, tiles=(16, 2, 2, 2), programs=3, stats=stats
    )
    call = AttentionCall(
        *(tensor.double() for tensor in (query, key, value)), HeadMap.uniform(len(RAGGED)), causal=causal, window=0, scale=0.2,
        softcap=0.0, bias=None, alibi_slopes=None, sinks=None, key_mask=None, query_mask=None, gate=gate.double(), stats=True,
    )  # fmt: skip
    exact = reference.attention_forward(call)[2]
    torch.testing.assert_close(stats.double(), exact.double(), rtol=1e-3, atol=1e-4)


MISTAKES = {
    "the producer waits for the wrong phase": {"freed_phase": lambda count, stages: (count // stages) & 1},
    "consumers read a phase early": {"filled_phase": lambda count, stages: ((count // stages) & 1) ^ 1},
    "nobody has the first turn": {"turn_phase": lambda count, who: count & 1},
    "both have the first turn": {"turn_phase": lambda count, who: (count & 1) ^ 1},
    "the output leaves without a fence": {"fence_async_shared": lambda: None},
    "the ring is counted one too short": {"slot": lambda count, stages: count % (stages - 1) if stages > 1 else 0},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_a_mistake_in_the_protocol(monkeypatch, mistake):
    with pytest.raises((Race, Deadlock)):
        run(monkeypatch, q_len=128, kv_len=160, causal=False, tiles=(16, 3, 2, 2), changes=MISTAKES[mistake])


@pytest.mark.parametrize("tiles", [(16, 1, 2, 2), (16, 2, 1, 2)])
def test_one_stage_would_deadlock(monkeypatch, tiles):
    with pytest.raises(Deadlock):
        run(monkeypatch, q_len=300, kv_len=64, causal=False, tiles=tiles)


def visits(batch_heads: int, row_blocks: int, programs: int, ahead: int | None = 0) -> list[list[tuple[int, int]]]:
    """The (head, block) tiles of each program, in its order; blocks of 128 rows."""
    rounds = schedule.pair_rounds(batch_heads, row_blocks, programs)
    rest = schedule.rest_of_tiles(batch_heads, row_blocks, 128, ahead, 128 * row_blocks, programs, torch.device("cpu")).tolist()
    found = []
    for program in range(programs):
        pairs = [schedule.paired.fn(program, turn, programs, row_blocks) for turn in range(2 * rounds)]
        last = [divmod(tile, row_blocks) for tile in rest[program] if tile >= 0]
        found.append([(head, block) for head, block in pairs if block >= 0] + last)
    return found


SIZES = [(1, 1, 1), (7, 5, 4), (6, 4, 24), (5, 3, 2), (64, 33, 132), (200, 7, 132), (31, 128, 132)]


@pytest.mark.parametrize(("batch_heads", "row_blocks", "programs"), SIZES)
def test_the_programs_visit_every_tile_once(batch_heads, row_blocks, programs):
    visited = [tile for own in visits(batch_heads, row_blocks, programs) for tile in own]
    assert sorted(visited) == [(head, block) for head in range(batch_heads) for block in range(row_blocks)]


@pytest.mark.parametrize(
    ("batch_heads", "row_blocks"), [(128, 16), (64, 32), (16, 256), (27, 32), (108, 32), (32, 16), (31, 128), (17, 128), (200, 33)]
)
def test_a_causal_mask_leaves_no_program_idle(batch_heads, row_blocks):
    """Work by the number of key blocks, 132 programs."""
    work = [sum(block + 1 for _, block in own) for own in visits(batch_heads, row_blocks, 132)]
    assert max(work) <= 1.05 * sum(work) / 132


def test_without_a_mask_no_program_has_two_tiles_more_than_another():
    counts = [len(own) for own in visits(37, 32, 132, None)]
    assert max(counts) - min(counts) <= 1


def test_pairs_keep_neighbours_on_one_head():
    heads = [{own[turn][0] for own in visits(64, 16, 132)} for turn in range(4)]
    assert max(map(len, heads)) <= -(-132 // 8) + 1


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_last_key_blocks_of_a_tile_need_a_mask(causal):
    for q_len, kv_len, block_m, block_n in [(1, 1, 128, 128), (130, 130, 128, 64), (100, 300, 64, 32), (256, 1000, 128, 128)]:
        visible = torch.ones(q_len, kv_len).tril(kv_len - q_len if causal else kv_len).bool()
        for block in range(-(-q_len // block_m)):
            rows = visible[block * block_m : (block + 1) * block_m]
            count, masked = schedule.key_blocks.fn(block, q_len, kv_len, block_m, block_n, causal)
            assert count * block_n >= int(rows.any(0).sum()) > (count - 1) * block_n
            assert rows[:, : (count - masked) * block_n].all()
            assert (count - masked) * block_n <= kv_len
