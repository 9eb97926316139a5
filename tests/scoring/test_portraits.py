import pytest
import torch
from tiny_models import bert, llama, padded, tokens

import headprune as hp
from headprune.errors import InvalidInput
from headprune.models.token_kinds import TokenKinds
from headprune.scoring import portrait_needs

FORWARD = lambda model, batch: model(**batch)  # noqa: E731
LENGTH = 16
BATCH = {"input_ids": tokens(4, LENGTH)}


def positional(rotary_offset: int) -> torch.nn.Module:
    """A decoder of one head, whose queries and keys do not depend on the token: it attends to the key `rotary_offset` back."""
    model = llama(
        layers=1, query_heads=1, kv_heads=1, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 3.0}
    )
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        turns = rotary_offset * 3.0 ** (-torch.arange(0, 8, 2) / 8)
        attention.k_proj.bias[:4] = 12.0
        attention.q_proj.bias[:4], attention.q_proj.bias[4:] = 12.0 * turns.cos(), -12.0 * turns.sin()
    return model


def labels_of(model, batch=BATCH, **options) -> list[tuple[str, ...]]:
    needs = {"attention", "attention_pattern"}
    observed = hp.observe(model, [batch], needs, loss_fn=FORWARD, **options)
    return [head.labels for heads in hp.portraits(observed).values() for head in heads]


@pytest.mark.parametrize(("offset", "label"), [(0, "itself"), (1, "previous token"), (3, "local")])
def test_heads_of_positions_are_named(offset, label):
    (labels,) = labels_of(positional(offset))
    assert label in labels
    assert "broad" not in labels


def test_a_head_that_does_not_look_is_broad():
    model = llama(layers=1, query_heads=1, kv_heads=1)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert labels_of(model) == [("broad",)]


def test_a_head_on_separators_is_named_where_they_are_known():
    """The query is constant, and the keys of tokens below 20 lie along it."""
    model = bert(layers=1, heads=1)
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
        table = model.embeddings.word_embeddings.weight
        table[:20] += 30 * (direction - direction.mean())
        attention.query.weight.zero_()
        attention.query.bias.copy_(direction)
        attention.key.weight.copy_(40 * torch.outer(direction, direction))
        attention.key.bias.zero_()
    ids = tokens(4, LENGTH)
    ids[:, 5] = 3
    ids[ids >= 20] = 33
    kinds = TokenKinds(special=frozenset(range(10)), punctuation=frozenset(range(10, 20)))
    batch = {"input_ids": ids}
    (labels,) = labels_of(model, batch, token_kinds=kinds)
    assert "separators and punctuation" in labels
    (labels,) = labels_of(model, batch)
    assert "separators and punctuation" not in labels


def test_portraits_carry_their_evidence():
    observed = hp.observe(llama(), [padded()], portrait_needs(llama()), loss_fn=FORWARD)
    found = hp.portraits(observed)
    for name, heads in found.items():
        for number, head in enumerate(heads):
            assert head.evidence["first_mass"] == pytest.approx(float(observed[name].first_mass[:, number].mean()))
            assert head.evidence["probe_induction"] == pytest.approx(float(observed[name].probe_induction[number]))
            assert "special_mass" not in head.evidence
            for label in head.labels:
                assert label in str(head)
    assert found.to_json()["model.layers.0.self_attn"][3]["labels"] == list(found["model.layers.0.self_attn"][3].labels)
    assert "model.layers.1.self_attn head 7" in str(found)


def test_portraits_of_encoders_are_without_induction():
    assert hp.Need.PROBE in portrait_needs(llama())
    assert hp.Need.PROBE not in portrait_needs(bert())
    with pytest.raises(InvalidInput, match="portraits need attention_pattern"):
        hp.portraits(hp.observe(bert(), [padded()], {"attention"}, loss_fn=FORWARD))
