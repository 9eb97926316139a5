import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import bert, llama, tokens

from headprune.models import attention_sites
from headprune.surgery import compensate, pieces
from headprune.surgery.compensate import resolve_outputs
from headprune.surgery.compensated_error import CompensatedError
from headprune.surgery.pieces import cheapest, split

WIDTH = 16


def batch_of(lengths: list[int], seed: int = 0, width: int = WIDTH) -> dict:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens(len(lengths), width, seed), "attention_mask": mask}


def padded(count: int) -> list[dict]:
    return [batch_of([3, 16, 4, 15, 3, 9], seed) for seed in range(count)]


@pytest.fixture
def cut(monkeypatch):
    """Passes so cheap that small batches are cut; what became of the batches of each call."""
    seen: list[list[pieces.Piece]] = []

    def watched(*given):
        seen.append(pieces.pieces_of(*given))
        return seen[-1]

    monkeypatch.setitem(pieces.PASS_COST, "cpu", 4)
    monkeypatch.setattr(compensate, "pieces_of", watched)
    return seen


def is_cut(found: list[pieces.Piece]) -> bool:
    return any(piece.rows is not None for piece in found)


def whole_weights(model, keep, batches, **options) -> dict:
    """The state after a re-solve on batches that run whole."""
    other = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensate, "pieces_of", lambda batches, *rest: pieces.whole(batches))
        resolve_outputs(other, attention_sites(other), keep, batches, **options)
    return other.state_dict()


def first_heads(model, count: int = 2) -> dict:
    return {site.name: list(range(count)) for site in attention_sites(model)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 12))
def test_no_grouping_by_length_takes_fewer_places(lengths, cost):
    groups = cheapest(lengths, cost)
    assert sorted(row for rows, _ in groups for row in rows) == list(range(len(lengths)))
    assert all(max(lengths[row] for row in rows) == width for rows, width in groups)

    order = sorted(lengths)
    least = min(
        sum(len(group) * group[-1] + cost for group in groups_at(order, ends))
        for count in range(len(order))
        for ends in itertools.combinations(range(1, len(order)), count)
    )
    assert sum(len(rows) * width + cost for rows, width in groups) == least


def groups_at(order: list[int], ends: tuple[int, ...]) -> list[list[int]]:
    return [order[start:end] for start, end in zip((0, *ends), (*ends, len(order)))]


def test_every_token_is_in_one_piece_with_all_that_belongs_to_it():
    batch = batch_of([3, 16, 4, 15, 3, 9]) | {"label": torch.arange(6), "token_type_ids": tokens(6, WIDTH, 1)}
    found = list(split(batch, 7, 4))
    assert len(found) > 1
    assert sorted(torch.cat([piece.rows for piece in found]).tolist()) == list(range(6))
    for piece in found:
        assert piece.of == 7
        assert torch.equal(piece.batch["label"], piece.rows)
        width = piece.batch["attention_mask"].shape[1]
        assert width == piece.batch["attention_mask"].sum(dim=1).max()
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert torch.equal(piece.batch[name], batch[name][piece.rows, :width])


def test_a_batch_padded_beyond_its_longest_text_is_trimmed():
    (piece,) = split(batch_of([5, 5, 4], width=32), 0, 64)
    assert piece.batch["input_ids"].shape == (3, 5)


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([16, 16, 16]),
        {"input_ids": tokens(3, WIDTH, 0)},
        batch_of([3, 16, 3]) | {"pixel_values": torch.ones(3, 2, 4, 4)},
        batch_of([3, 16, 3]) | {"targets": torch.ones(3, WIDTH)},
        batch_of([3, 16, 3]) | {"bias": torch.ones(WIDTH)},
        {name: value.flip(1) for name, value in batch_of([3, 16, 3]).items()},
        [tokens(3, WIDTH, 0)],
    ],
    ids=["full", "no mask", "pictures", "as many targets as tokens", "nothing by sample", "padded in front", "no mapping"],
)
def test_what_has_no_padding_at_its_end_or_cannot_be_cut_stays_whole(batch):
    (piece,) = split(batch, 0, 4)
    assert piece.batch is batch
    assert piece.rows is None


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("feed_forward", [False, True])
def test_weights_are_re_solved_as_from_whole_batches(make, feed_forward, cut):
    model, batches = make(), padded(6)
    keep = first_heads(model)
    expected = whole_weights(model, keep, batches, feed_forward=feed_forward)
    resolve_outputs(model, attention_sites(model), keep, batches, feed_forward=feed_forward)
    assert is_cut(cut[0])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_batches_are_cut_in_every_precision(dtype, cut):
    model = llama().to(dtype)
    resolve_outputs(model, attention_sites(model), first_heads(model), padded(6))
    assert is_cut(cut[0])


def pooled(model, batch):
    return model(**batch)[0].sum(dim=1)


def test_plans_have_the_errors_that_they_have_on_whole_batches(cut, monkeypatch):
    model, batches = bert(), padded(6)
    sites = attention_sites(model)
    plans = [{site.name: heads for site in sites} for heads in ([0, 1], [2, 3], [1])]

    def embedding(model, batch):
        states = (model(**batch)[0] * batch["attention_mask"][..., None]).sum(dim=1)
        return torch.nn.functional.normalize(states, dim=-1)

    found = CompensatedError(model, sites, batches, forward=embedding, held_out_every=3)(plans)
    assert is_cut(cut[0])
    monkeypatch.setattr(compensate, "pieces_of", lambda batches, *rest: pieces.whole(batches))
    expected = CompensatedError(model, sites, batches, forward=embedding, held_out_every=3)(plans)
    assert found == pytest.approx(expected, rel=1e-4)


def beside_the_others(model, batch):
    """Embeddings less their mean over the batch."""
    found = pooled(model, batch)
    return found - found.mean(dim=0)


def similarities(model, batch):
    found = pooled(model, batch)
    return found @ found.T


def pairs(model, batch):
    first, second = pooled(model, batch).chunk(2)
    return torch.cat([first - second, second - first])


def a_loss(model, batch):
    return pooled(model, batch).mean()


@pytest.mark.parametrize("forward", [beside_the_others, similarities, pairs, a_loss, pooled])
def test_a_function_that_gives_samples_something_else_in_pieces_sees_whole_batches(forward, cut):
    """The last one counts padded tokens."""
    model, batches = bert(), padded(6)
    resolve_outputs(model, attention_sites(model), first_heads(model), batches, forward=forward)
    assert not is_cut(cut[0])
    assert all(piece.batch is batch for piece, batch in zip(cut[0], batches, strict=True))


@pytest.mark.parametrize(
    "token_mask",
    [
        lambda batch: torch.ones_like(batch["input_ids"]),
        lambda batch: None,
        lambda batch: torch.ones(6, WIDTH) * batch["attention_mask"],
    ],
    ids=["padding counts", "everything counts", "of whole batches alone"],
)
def test_a_mask_that_counts_padding_or_fits_whole_batches_alone_sees_whole_batches(token_mask, cut):
    model = bert()
    resolve_outputs(model, attention_sites(model), first_heads(model), padded(6), token_mask=token_mask)
    assert not is_cut(cut[0])


def test_a_model_that_does_not_mask_padding_sees_whole_batches(cut):
    class Unmasked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = bert()

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids)

    model = Unmasked()
    resolve_outputs(model, attention_sites(model), first_heads(model), padded(6))
    assert not is_cut(cut[0])
