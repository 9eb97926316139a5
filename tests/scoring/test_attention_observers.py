import math

import pytest
import torch
from scoring.attention_by_definition import divergence, eager_attentions, entropy, row_means
from tiny_models import bert, llama, padded, tokens

from headprune import nn as hp_nn
from headprune import scoring
from headprune.errors import InvalidInput
from headprune.models import attention_sites
from headprune.models.gating import output_input_hook
from headprune.models.token_kinds import TokenKinds
from headprune.planning import PruningPlan
from headprune.surgery import cut

NEEDS = ("attention", "attention_pattern", "attention_distance", "output_norm")
KINDS = TokenKinds(special=frozenset({0, 7, 9, 30}), punctuation=frozenset({3, 4, 5, 41}))
FORWARD = lambda model, batch: model(**batch)  # noqa: E731


def ragged_llama():
    model = llama()
    keep = {"model.layers.0.self_attn": [0, 1, 2, 5], "model.layers.1.self_attn": [1, 4, 6, 7]}
    cut(model, PruningPlan.from_keep(model, keep))
    return model


# The eager attention of transformers knows equal groups alone, so ragged layers are compared through the dense model.
CASES = [(bert, "right"), (llama, "left"), (llama, "right")]


@pytest.mark.parametrize(("make", "side"), CASES)
def test_statistics_are_means_over_the_rows_of_eager_attention(make, side):
    model, batch = make(), padded(side=side)
    observed = scoring.observe(model, [batch], NEEDS, loss_fn=FORWARD, token_kinds=KINDS)
    special = torch.isin(batch["input_ids"], torch.tensor(sorted(KINDS.special)))
    marks = torch.isin(batch["input_ids"], torch.tensor(sorted(KINDS.punctuation)))
    first = batch["attention_mask"].argmax(dim=1)
    places = torch.arange(9)
    for name, weights in eager_attentions(model, batch).items():
        mask, site = batch["attention_mask"], observed[name]
        weights = weights * mask[:, None, :, None]
        by_row = {
            "entropy": entropy,
            "max_prob": lambda row, query: row.max(),
            "distance": lambda row, query: (row * (places - query).abs()).sum(),
            "previous_mass": lambda row, query: row[query - 1] if query else 0.0,
            "self_mass": lambda row, query: row[query],
            "local_mass": lambda row, query: row[max(0, query - 4) : query + 5].sum(),
            "evenness": lambda row, query: entropy(row, query) / max(math.log((row > 0).sum()), 1e-9),
        }
        for field, value in by_row.items():
            assert torch.allclose(getattr(site, field).double(), row_means(weights, mask, value), atol=1e-5), field
        for sample in range(len(mask)):
            one = slice(sample, sample + 1)
            of_sample = {
                "first_mass": lambda row, query, sample=sample: row[first[sample]],
                "special_mass": lambda row, query, sample=sample: row[special[sample]].sum(),
                "punctuation_mass": lambda row, query, sample=sample: row[marks[sample]].sum(),
                "ordinary_max_prob": lambda row, query, sample=sample: row.masked_fill(special[sample], 0.0).max(),
            }
            for field, value in of_sample.items():
                expected = row_means(weights[one], mask[one], value)
                assert torch.allclose(getattr(site, field)[one].double(), expected, atol=1e-5), field


@pytest.mark.parametrize(("make", "side"), CASES)
def test_distances_are_jensen_shannon_divergences_of_rows(make, side):
    model, batch = make(), padded(side=side)
    observed = scoring.observe(model, [batch], {"attention_distance"}, loss_fn=FORWARD)
    for name, weights in eager_attentions(model, batch).items():
        rows = weights.transpose(1, 2)[batch["attention_mask"].bool()]  # [rows, heads, keys]
        assert observed[name].distance_rows == len(rows) == batch["attention_mask"].sum()
        for first, second in ((0, 1), (3, 1), (2, 2)):
            expected = sum(divergence(row[first], row[second]) for row in rows)
            assert float(observed[name].distance_sum[first, second]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("make", [bert, llama, ragged_llama])
def test_output_norms_are_lengths_of_what_heads_add(make):
    model, batch = make(), padded()
    observed = scoring.observe(model, [batch], {"output_norm", "attention"}, loss_fn=FORWARD)
    mask = batch["attention_mask"].bool()
    for site in attention_sites(model):
        seen = []
        with torch.no_grad(), output_input_hook(site, seen.append):
            model(**batch)
        for sample in range(len(mask)):
            for head, columns in enumerate(site.output.features):
                inputs = seen[0][sample, mask[sample]][:, columns]
                added = inputs @ site.output.module.weight.detach()[:, columns].T
                found = observed[site.name]
                assert float(found.projected_norm[sample, head]) == pytest.approx(float(added.norm(dim=1).mean()), rel=1e-4)
                assert float(found.output_norm[sample, head]) == pytest.approx(float(inputs.norm(dim=1).mean()), rel=1e-4)


def test_heads_that_stay_have_the_statistics_that_they_had():
    """In the first layer, whose input no cut changes."""
    dense, ragged, batch = llama(), ragged_llama(), padded()
    before, after = (scoring.observe(model, [batch], NEEDS, loss_fn=FORWARD) for model in (dense, ragged))
    name, kept = "model.layers.0.self_attn", [0, 1, 2, 5]
    for field in ("entropy", "max_logit", "local_mass", "projected_norm"):
        assert torch.allclose(getattr(after[name], field), getattr(before[name], field)[:, kept], atol=1e-5)
    assert torch.allclose(after[name].distance_sum, before[name].distance_sum[kept][:, kept], atol=1e-4)


@pytest.mark.parametrize("make", [bert, ragged_llama])
def test_statistics_do_not_depend_on_padding_or_on_how_data_are_cut(make):
    model = make()
    batches = [{"input_ids": tokens(2, 8, seed), "attention_mask": torch.ones(2, 8, dtype=torch.long)} for seed in range(3)]
    longer = [{name: torch.nn.functional.pad(values, (0, 3)) for name, values in batch.items()} for batch in batches]
    observe = lambda data: scoring.observe(model, data, NEEDS, loss_fn=FORWARD, token_kinds=KINDS)  # noqa: E731
    whole, merged, wide = observe(batches), observe(batches[:1]) + observe(batches[1:]), observe(longer)
    for name, site in whole.items():
        assert site.entropy.shape == (6, site.shape.head_map.query_heads)
        for need in map(scoring.Need, NEEDS):
            for field in scoring.observations.fields_of(need):
                assert torch.allclose(getattr(merged[name], field), getattr(site, field), rtol=1e-12), field
                assert torch.allclose(getattr(wide[name], field), getattr(site, field), atol=1e-4), field


def test_the_rows_of_large_attentions_come_in_blocks(monkeypatch):
    whole = scoring.observe(llama(), [padded()], NEEDS, loss_fn=FORWARD)
    monkeypatch.setattr("headprune.ops.rows.BLOCK_ELEMENTS", 8 * 9 * 2)
    pieces = scoring.observe(llama(), [padded()], NEEDS, loss_fn=FORWARD)
    for name, site in whole.items():
        assert torch.allclose(pieces[name].local_mass, site.local_mass, atol=1e-6)
        assert torch.allclose(pieces[name].distance_sum, site.distance_sum, atol=1e-5)


def test_our_own_layers_are_watched_with_and_without_weights():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    hp_nn.replace_multihead_attention(model)
    states, padding = torch.randn(2, 7, 32), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    options = {"token_mask": lambda batch: ~batch["padding"]}
    run = lambda model, batch: model(batch["states"], src_key_padding_mask=batch["padding"])  # noqa: E731
    batch = {"states": states, "padding": padding}
    found = scoring.observe(model, [batch], {"attention"}, loss_fn=run, **options)
    attention = model.layers[0].self_attn

    def direct(need):
        return lambda model, batch: model(*[batch["states"]] * 3, key_padding_mask=batch["padding"], need_weights=need)

    _, weights = attention(states, states, states, key_padding_mask=padding, average_attn_weights=False)
    expected = row_means(weights.detach().double(), ~padding, entropy)
    for need in (True, False):
        alone = scoring.observe(attention, [batch], {"attention"}, loss_fn=direct(need), **options)
        assert torch.allclose(alone[""].entropy.double(), expected, atol=1e-5)
    assert torch.allclose(found["layers.0.self_attn"].entropy.double(), expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "headprune"])
def test_the_attention_implementation_is_as_before_even_after_an_error(implementation):
    model = bert()
    model.set_attn_implementation(implementation)
    scoring.observe(model, [padded()], {"attention"}, loss_fn=FORWARD)
    assert model.config._attn_implementation == implementation

    def fails(model, batch):
        assert model.config._attn_implementation == "headprune"
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        scoring.observe(model, [padded()], NEEDS, loss_fn=fails)
    assert model.config._attn_implementation == implementation
    assert not any(hasattr(module, "attention_watchers") for module in model.modules())


class OwnAttention(torch.nn.Module):
    """Laid out like a decoder layer's attention, but multiplies its matrices by itself."""

    def __init__(self):
        super().__init__()
        self.config = None
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(8, 8))
        self.head_dim, self.num_heads = 4, 2

    def forward(self, states):
        q, k, v = (getattr(self, name)(states).unflatten(2, (2, 4)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        return self.o_proj(((q @ k.transpose(2, 3)).softmax(3) @ v).transpose(1, 2).flatten(2))


def test_an_attention_that_cannot_be_watched_is_named():
    model = torch.nn.Sequential(OwnAttention())
    run = lambda model, batch: model(batch)  # noqa: E731
    with pytest.raises(InvalidInput, match=r"0 \(OwnAttention\) computes its attention by itself"):
        scoring.observe(model, [torch.randn(1, 3, 8)], {"attention"}, loss_fn=run)
    assert scoring.observe(model, [torch.randn(1, 3, 8)], {"output_norm"}, loss_fn=run)["0"].projected_norm.shape == (1, 2)


def test_grams_can_be_summed_elsewhere():
    plain = scoring.observe(bert(), [padded()], {"gram"}, loss_fn=FORWARD)
    asked = scoring.observe(bert(), [padded()], {"gram"}, loss_fn=FORWARD, gram_device="cpu")
    for name, site in plain.items():
        assert torch.equal(asked[name].input_gram, site.input_gram)
        assert site.input_gram.dtype == torch.float64


def test_token_kinds_come_from_a_tokenizer():
    class Tokenizer:
        all_special_ids = (0, 1)

        def get_vocab(self):
            return {"[PAD]": 0, ".": 1, ",": 2, "##!": 3, "Ġ(": 4, "word": 5, "a.": 6, "Ġ": 7}

    found = TokenKinds.of(Tokenizer())
    assert found == TokenKinds(frozenset({0, 1}), frozenset({2, 3, 4}))
    assert TokenKinds.of(found) is found
    with pytest.raises(InvalidInput, match="token_kinds is a str"):
        scoring.observe(bert(), [padded()], {"attention_pattern"}, token_kinds="minilm")


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match=r"token mask is \[3, 8\]"):
        scoring.observe(bert(), [padded()], {"attention"}, loss_fn=FORWARD, token_mask=lambda b: b["attention_mask"][:, 1:])
