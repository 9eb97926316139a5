"""Gate gradients under activation checkpointing, in shared layers, and what they leave behind."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scoring.test_scores import gate_gradients_by_definition, language_batches, per_sample_loss
from tiny_models import llama
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from headprune import scoring
from headprune.errors import InvalidInput
from headprune.evaluation.memory import peak_bytes
from headprune.models import attention_sites, checkpointing
from headprune.models.adapters import warn_once
from headprune.models.checkpointing import checkpointed
from headprune.nn import VariableHeadAttention
from headprune.scoring import Need, Observations, block_fisher
from headprune.scoring.observers.gate_gradient import sample_count

NEEDS = {"gate_gradient", "gram", "attention", "attention_pattern", "attention_distance", "output_norm"}


def shared():
    """A decoder that runs its one layer three times, as ALBERT does."""
    model = llama(layers=1)
    model.model.layers.extend([model.model.layers[0]] * 2)
    model.config.num_hidden_layers, model.config.use_cache = 3, False
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [llama, shared])
def test_gradients_count_every_call_of_a_site_once(make, checkpointing):
    batches = language_batches(2)
    options = {"loss_fn": per_sample_loss, "checkpointing": checkpointing}
    observed = scoring.observe(make(), batches, {Need.GATE_GRADIENT}, **options)
    expected = gate_gradients_by_definition(make(), batches)
    assert list(observed) == list(expected)
    for name, site in observed.items():
        assert torch.allclose(site.gate_gradient, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [llama, shared])
def test_a_layer_that_runs_again_backwards_is_not_observed_again(make):
    batches = language_batches(2)
    plain, again = (scoring.observe(make(), batches, NEEDS, checkpointing=checkpointing) for checkpointing in (False, True))
    for name, site in plain.items():
        for need in map(Need.of, NEEDS):
            for field in scoring.observations.fields_of(need):
                found, expected = getattr(again[name], field), getattr(site, field)
                assert (found is None) == (expected is None)
                assert found is None or torch.allclose(found, expected, rtol=1e-5, atol=1e-7), field


def kept_bytes(model, batch, checkpointing: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, each memory once."""
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def loss_fn(model, batch):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return per_sample_loss(model, batch)

    scoring.observe(model, [batch], {"gate_gradient"}, loss_fn=loss_fn, checkpointing=checkpointing)
    return sum(seen.values()) - weight_bytes(model, seen)


def weight_bytes(model, seen) -> int:
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer in seen)


def test_checkpointing_keeps_far_less():
    (batch,) = language_batches(1, batch=8)
    full, less = (kept_bytes(llama(layers=6), batch, checkpointing) for checkpointing in (False, True))
    assert less < full / 2


def wide_llama():
    model = llama()
    for layer in model.model.layers:
        layer.mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=1024))
    return model


def test_feed_forwards_take_some_samples_at_a_time(monkeypatch):
    """The same scores, and less of the gradients of the inner width at once."""
    monkeypatch.setattr(checkpointing, "PART_TOKENS", 16)
    (batch,) = language_batches(1, batch=8)
    scores: list[scoring.HeadScores] = []
    peaks: list[int] = []

    def score(model):
        scores.append(scoring.score(model, [batch], loss_fn=per_sample_loss, checkpointing=True))

    for parts in (1, 4):
        monkeypatch.setattr(checkpointing, "PARTS", parts)
        torch.manual_seed(0)
        peaks.append(peak_bytes(partial(score, wide_llama())))
    for name, found in scores[0].items():
        assert torch.allclose(found, scores[1][name], rtol=1e-4)
    assert peaks[1] < 0.85 * peaks[0]


def test_one_sample_is_taken_some_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(checkpointing, "PART_TOKENS", 3)
    states, sizes = torch.randn(1, 10, 4), []
    found = checkpointing.in_parts(lambda part: (sizes.append(part.shape[1]), 2 * part)[1], states)
    assert torch.equal(found, 2 * states)
    assert sizes == [4, 4, 2]


def test_checkpointing_is_gone_afterwards_even_after_an_error():
    model = llama()
    before = [dict(layer.__dict__) for layer in model.model.layers]
    with pytest.raises(InvalidInput, match="does not depend"):
        scoring.score(model, language_batches(1), loss_fn=lambda model, batch: torch.tensor(1.0), checkpointing=True)
    assert [dict(layer.__dict__) for layer in model.model.layers] == before
    with torch.no_grad(), checkpointed(model):
        assert model(input_ids=language_batches(1)[0]["input_ids"], use_cache=True).past_key_values.get_seq_length() == 10


def test_checkpointing_inside_checkpointing_changes_nothing():
    model = llama()
    batch = language_batches(1)[0]
    expected = model(**batch).logits
    with checkpointed(model):
        with checkpointed(model):
            torch.testing.assert_close(model(**batch).logits, expected)
        assert all("forward" in vars(layer) for layer in model.model.layers)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_layers_to_checkpoint_is_named():
    with (
        pytest.raises(InvalidInput, match="Linear has no layer that transformers can checkpoint"),
        checkpointed(torch.nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_get_no_gradients(checkpointing):
    model, asked = llama(), []
    model.requires_grad_(True)

    def loss_fn(model, batch):
        asked.extend(parameter.requires_grad for parameter in model.parameters())
        return per_sample_loss(model, batch)

    scoring.score(model, language_batches(1), "fisher", loss_fn=loss_fn, checkpointing=checkpointing)
    assert not any(asked)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_input_of_the_output_projection_is_kept_by_reference():
    """The tap saves the very memory that the attention gave."""
    model, saved, given = llama(layers=1), set(), []
    (site,) = attention_sites(model)
    site.output.module.register_forward_pre_hook(lambda module, args: given.append(args[0].data_ptr()))

    def loss_fn(model, batch):
        keep = lambda tensor: saved.add(tensor.data_ptr()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return per_sample_loss(model, batch)

    scoring.observe(model, language_batches(1), {"gate_gradient"}, loss_fn=loss_fn)
    assert set(given) <= saved


def test_block_fisher_is_the_mean_of_outer_products():
    batches = language_batches()
    observed = scoring.observe(llama(), batches, {"gate_gradient"}, loss_fn=per_sample_loss)
    expected = gate_gradients_by_definition(llama(), batches)
    blocks, diagonal = block_fisher(observed), scoring.score_observations(observed, "fisher")
    for name, rows in expected.items():
        mean = sum(torch.outer(row, row) for row in rows) / len(rows)
        assert torch.allclose(blocks[name].float(), mean, rtol=1e-2, atol=1e-6)
        assert torch.allclose(blocks[name].diagonal().float(), diagonal[name], rtol=1e-5)
    with pytest.raises(InvalidInput, match="were not observed"):
        block_fisher(scoring.observe(llama(), [], {"weights"}))
    assert block_fisher(Observations({})) == {}


def test_a_batch_that_is_one_tensor_has_as_many_samples_as_rows():
    windowed = SimpleNamespace(name="window", windowed=True)
    assert sample_count(torch.zeros(8, 3, 4, 4), torch.tensor(0.0), [windowed], {"window": torch.zeros(32, 2)}) == 8


def test_each_text_is_a_sample_where_a_loss_reads_several():
    """A contrastive loss of pairs: one loss a query, whose batch holds the documents too."""
    batch = {"input_ids": torch.randint(1, 50, (6, 5), generator=torch.Generator().manual_seed(0))}

    def loss(model, batch):
        queries, documents = model(**batch).logits.mean(dim=1).chunk(2)
        return nn.functional.cross_entropy(queries @ documents.T, torch.arange(3), reduction="none")

    apart = scoring.observe(llama(), [batch], {"gate_gradient"}, loss_fn=loss)
    together = scoring.observe(llama(), [batch], {"gate_gradient"}, loss_fn=lambda *given: loss(*given).sum() / 6)
    for name, found in apart.items():
        assert found.gate_gradient.shape[0] == 6
        torch.testing.assert_close(found.gate_gradient, together[name].gate_gradient)


class RowsOfPictures(nn.Module):
    """Attends along the rows of pictures [samples, rows, columns, features]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = VariableHeadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        return self.head(self.attention(rows, rows, rows, need_weights=False)[0].view_as(x).mean(dim=(1, 2)))


def test_sequences_that_are_no_samples_are_summed_for_one_sample_and_told_for_several(caplog):
    model, x = RowsOfPictures().eval(), torch.randn(3, 5, 6, 16)
    loss = lambda model, x: model(x).square().sum(dim=1)  # noqa: E731
    warn_once.cache_clear()
    rows = scoring.observe(model, [x], {"gate_gradient"}, loss_fn=loss)["attention"].gate_gradient
    assert "attention runs 15 sequences where the loss gives 3 samples; each sequence counts as a sample" in caplog.text
    assert rows.shape == (15, 4)
    found = scoring.observe(model, x.split(1), {"gate_gradient"}, loss_fn=loss)["attention"].gate_gradient
    for index, sample in enumerate(x.split(1)):
        gate = torch.ones(4, requires_grad=True)
        model.attention.gate = nn.Parameter(gate)
        loss(model, sample).sum().backward()
        torch.testing.assert_close(found[index], model.attention.gate.grad)
        model.attention.gate = None
