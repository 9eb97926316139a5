"""Criteria of forward passes: each against its formula on the model's own eager attention."""

import math

import pytest
import torch
from scoring.attention_by_definition import divergence, eager_attentions, entropy, row_means
from tiny_decoders import decoder
from tiny_models import VOCABULARY, bert, llama, padded, tokens

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.models.token_kinds import TokenKinds
from headprune.scoring.criteria.attention_redundancy import removal_scores
from headprune.scoring.observers import probe

FORWARD = lambda model, batch: model(**batch)  # noqa: E731
SPECIAL = TokenKinds(special=frozenset({0, 7, 9, 30}))
ROW_VALUES = {
    "entropy": lambda row, query: -entropy(row, query),
    "entropy_inverted": entropy,
    "confidence": lambda row, query: row.max(),
    "locality": lambda row, query: -(row * (torch.arange(len(row)) - query).abs()).sum(),
}


@pytest.mark.parametrize("make", [bert, llama])
def test_criteria_of_rows_are_means_over_tokens_then_sequences(make):
    model, batches = make(), [padded(side="right"), {"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 9).long()}]
    found = scoring.score(model, batches, [*ROW_VALUES, "first_token_mass"], loss_fn=FORWARD)
    by_batch = [eager_attentions(model, batch) for batch in batches]
    values = ROW_VALUES | {"first_token_mass": lambda row, query: 1 - row[0]}
    for name in by_batch[0]:
        for criterion, value in values.items():
            rows = [row_means(attention[name], batch["attention_mask"], value) for attention, batch in zip(by_batch, batches)]
            assert torch.allclose(found[criterion][name].double(), torch.cat(rows).mean(dim=0), atol=1e-5), criterion
            assert found[criterion].spread is not None


def test_confidence_can_leave_special_tokens_out():
    model, batch = bert(), padded(side="right")
    scores = scoring.score(model, [batch], "confidence_ordinary", loss_fn=FORWARD, token_kinds=SPECIAL)
    ordinary = ~torch.isin(batch["input_ids"], torch.tensor(sorted(SPECIAL.special)))
    for name, weights in eager_attentions(model, batch).items():
        weights = weights * ordinary[:, None, None, :]
        expected = row_means(weights, batch["attention_mask"], lambda row, query: row.max())
        assert torch.allclose(scores[name].double(), expected.mean(dim=0), atol=1e-5)
    with pytest.raises(InvalidInput, match="token_kinds=tokenizer"):
        scoring.score(model, [batch], "confidence_ordinary", loss_fn=FORWARD)


@pytest.mark.parametrize("make", [bert, llama])
def test_output_norms_follow_their_formulas(make):
    model, batch = make(), padded(side="right")
    found = scoring.score(model, [batch], ["output_norm", "activation_norm"], loss_fn=FORWARD)
    mask = batch["attention_mask"].bool()
    for site in attention_sites(model):
        seen = []
        handle = site.output.module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        model(**batch)
        handle.remove()
        for head, columns in enumerate(site.output.features):
            outputs = seen[0][..., columns]
            added = outputs @ site.output.module.weight.detach()[:, columns].T
            for criterion, vectors in (("output_norm", added), ("activation_norm", outputs)):
                means = [vectors[sample, mask[sample]].norm(dim=1).mean() for sample in range(3)]
                assert float(found[criterion][site.name][head]) == pytest.approx(float(torch.stack(means).mean()), rel=1e-4)


def test_the_head_like_another_goes_first_and_one_of_twins_stays():
    model, batch = bert(layers=1), padded(side="right")
    attention = model.encoder.layer[0].attention.self
    for projection in (attention.query, attention.key):
        projection.weight.data[8:16] = projection.weight.data[:8]
        projection.bias.data[8:16] = projection.bias.data[:8]
    scores = scoring.score(model, [batch], "attention_redundancy", loss_fn=FORWARD)["encoder.layer.0.attention"]
    assert int(scores.argmin()) in (0, 1)
    assert float(scores.min()) == pytest.approx(0.0, abs=1e-5)
    assert float(scores[:2].max()) > 0.01
    assert float(scores.max()) == pytest.approx(math.log(2))


def test_redundancy_is_the_greedy_order_over_mean_divergences():
    model, batch = bert(), padded(side="right")
    scores = scoring.score(model, [batch], "attention_redundancy", loss_fn=FORWARD)
    for name, weights in eager_attentions(model, batch).items():
        rows = weights.transpose(1, 2)[batch["attention_mask"].bool()]
        left, expected = [0, 1, 2, 3], {}
        apart = {(a, b): sum(divergence(row[a], row[b]) for row in rows) / len(rows) for a in left for b in left}
        while len(left) > 1:
            near = {head: min(apart[head, other] for other in left if other != head) for head in left}
            closest = min(near.values())
            twins = [head for head in left if near[head] == pytest.approx(closest, rel=1e-9)]
            head = min(twins, key=lambda one: sum(apart[one, other] for other in left))
            expected[head] = max([closest, *expected.values()])
            left.remove(head)
        for head, value in expected.items():
            assert float(scores[name][head]) == pytest.approx(value, rel=1e-3)


def test_removal_scores_never_fall_along_the_order():
    points = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = removal_scores(torch.cdist(points, points)).sort().values
    assert (scores[1:-1] > scores[:-2]).all()


def attention_on(model, ids) -> dict[str, torch.Tensor]:
    return eager_attentions(model, {"input_ids": ids})


def test_induction_and_previous_token_are_attention_on_repeated_random_tokens():
    model = llama()
    found = scoring.score(model, criterion=["induction", "previous_token"])
    ids, longest = probe.ordinary_tokens(model)
    sequences, length = probe.repeated_sequences(ids, longest)
    assert torch.equal(sequences[:, :length], sequences[:, length:])
    assert all(len(row.unique()) == length for row in sequences)
    for name, weights in attention_on(model, sequences).items():
        for head in range(8):
            following = [
                weights[row, head, query, query - length + 1] for row in range(4) for query in range(length, 2 * length - 1)
            ]
            before = [weights[row, head, query, query - 1] for row in range(4) for query in range(1, 2 * length)]
            assert float(found["induction"][name][head]) == pytest.approx(float(torch.stack(following).mean()), abs=1e-5)
            assert float(found["previous_token"][name][head]) == pytest.approx(float(torch.stack(before).mean()), abs=1e-5)


def test_retrieval_is_the_share_of_needle_tokens_most_attended_to():
    model = llama()
    scores = scoring.score(model, criterion="retrieval")
    ids, longest = probe.ordinary_tokens(model)
    sequences, places, width = probe.needles_in_haystacks(ids, longest)
    for row, place in enumerate(places):
        assert torch.equal(sequences[row, place : place + width], sequences[row, -width:])
        assert not torch.isin(sequences[row, :place], sequences[row, -width:]).any()
    assert sequences.shape[1] <= longest
    for name, weights in attention_on(model, sequences).items():
        for head in range(8):
            hits = [
                int(weights[row, head, sequences.shape[1] - width + step].argmax()) == place + step + 1
                for row, place in enumerate(places)
                for step in range(width - 1)
            ]
            assert float(scores[name][head]) == pytest.approx(sum(hits) / len(hits), abs=1e-5)


def test_a_uniform_head_has_the_previous_token_score_of_chance():
    model = llama(layers=1, query_heads=2, kv_heads=2)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
    scores = scoring.score(model, criterion=["previous_token"])
    count = 2 * probe.REPEATED
    uniform = sum(1 / (query + 1) for query in range(1, count)) / (count - 1)
    assert scores["previous_token"]["model.layers.0.self_attn"].tolist() == pytest.approx([uniform] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "names"),
    [(bert, "attends to later tokens"), (lambda: torch.nn.Sequential(llama()), "no decoder that reads token ids")],
)
def test_what_cannot_be_probed_is_named(make, names):
    with pytest.raises(InvalidInput, match=names):
        scoring.score(make(), criterion="induction")


def test_attention_that_a_model_computes_by_itself_is_named_not_data_that_no_probe_reads():
    with pytest.raises(InvalidInput, match=r"0\.self_attention \(BloomAttention\) computes its attention by itself"):
        scoring.score(decoder("bloom"), criterion="induction")


@pytest.mark.parametrize("name", ["induction", "previous_token", "retrieval"])
def test_no_probe_scores_heads_behind_nan(name):
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"NaN for heads \[0\]"):
        scoring.score(model, criterion=name)


def test_special_tokens_are_not_generated():
    model = llama()
    ids, longest = probe.ordinary_tokens(model)
    assert longest == 128
    assert sorted(ids.tolist()) == [index for index in range(VOCABULARY) if index not in (0, 1, 2)]
