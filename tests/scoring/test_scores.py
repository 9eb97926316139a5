import pytest
import torch
from safetensors.torch import save_file
from tiny_models import bert, llama, tokens

from headprune import scoring
from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.models import attention_sites, gated
from headprune.scoring import HeadScores, Need, Observations

SITE = "model.layers.1.self_attn"


def language_batches(count: int = 3, batch: int = 4) -> list[dict]:
    return [{"input_ids": tokens(batch, 10, seed), "labels": tokens(batch, 10, seed)} for seed in range(count)]


def per_sample_loss(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses.mean(dim=1)


def gate_gradients_by_definition(model, batches) -> dict[str, torch.Tensor]:
    """dL_n/dgate by autograd through a real gate on every head, one sample at a time."""
    rows = {site.name: [] for site in attention_sites(model)}
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            sample = {key: value[row : row + 1] for key, value in batch.items()}
            gates, handles = {}, []
            for site in attention_sites(model):
                gate = torch.ones(site.head_map.query_heads, requires_grad=True)
                gates[site.name] = gate
                hook = lambda module, args, gate=gate, site=site: args[0] * gate[site.head_of_column()]  # noqa: E731
                handles.append(site.output.module.register_forward_pre_hook(hook))
            per_sample_loss(model, sample).sum().backward()
            for handle in handles:
                handle.remove()
            for name, gate in gates.items():
                rows[name].append(gate.grad)
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize("implementation", ["sdpa", "headprune"])
def test_gate_gradients_are_those_of_autograd_sample_by_sample(implementation):
    model, batches = llama(), language_batches()
    model.set_attn_implementation(implementation)
    observed = scoring.observe(model, batches, {Need.GATE_GRADIENT}, loss_fn=per_sample_loss)
    expected = gate_gradients_by_definition(llama(), batches)
    for name, site in observed.items():
        assert torch.allclose(site.gate_gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_mean_loss_is_scaled_to_its_samples():
    model, batches = llama(), language_batches()
    exact = scoring.observe(model, batches, {"gate_gradient"}, loss_fn=per_sample_loss)
    mean = scoring.observe(model, batches, {"gate_gradient"}, loss_fn=lambda m, b: per_sample_loss(m, b).mean())
    own = scoring.observe(model, batches, {"gate_gradient"})  # the model's own loss; all samples are equally long
    for name in exact:
        assert torch.allclose(mean[name].gate_gradient, exact[name].gate_gradient, rtol=1e-4, atol=1e-7)
        assert torch.allclose(own[name].gate_gradient, exact[name].gate_gradient, rtol=1e-4, atol=1e-7)


def test_fisher_and_gate_gradient_follow_their_formulas():
    model, batches = llama(), language_batches()
    scores = scoring.score(model, batches, ["fisher", "gate_gradient"], loss_fn=per_sample_loss)
    expected = gate_gradients_by_definition(llama(), batches)
    for name, gradient in expected.items():
        assert torch.allclose(scores["fisher"][name], gradient.square().mean(0), rtol=1e-3, atol=1e-9)
        assert torch.allclose(scores["gate_gradient"][name], gradient.abs().mean(0), rtol=1e-3, atol=1e-7)


def test_magnitudes_follow_their_formulas_and_share_key_value_heads():
    model = llama()
    found = scoring.score(model, criterion=["magnitude_l1", "magnitude_l2", "magnitude_output"])
    attention = model.model.layers[1].self_attn
    q, k, v, o = (getattr(attention, name).weight.detach() for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    head, group = 5, 2
    slices = [q[40:48], k[16:24], v[16:24], o[:, 40:48]]
    shares = [1.0, 0.5, 0.5, 1.0]
    name = "model.layers.1.self_attn"
    assert group == 5 // 2
    l1 = sum(share * part.abs().sum() for share, part in zip(shares, slices))
    l2 = sum(share * part.norm() for share, part in zip(shares, slices))
    assert found["magnitude_l1"][name][head] == pytest.approx(float(l1), rel=1e-5)
    assert found["magnitude_l2"][name][head] == pytest.approx(float(l2), rel=1e-5)
    assert found["magnitude_output"][name][head] == pytest.approx(float(o[:, 40:48].norm()), rel=1e-5)


def test_normalizations_follow_their_formulas():
    model, batches = llama(), language_batches()
    plain, l2, total = (scoring.score(model, batches, "fisher", normalize=by) for by in ("none", "layer_l2", "layer_sum"))
    for name in plain:
        assert torch.allclose(l2[name], plain[name] / plain[name].norm())
        assert torch.allclose(total[name], plain[name] / plain[name].sum())


def test_observing_leaves_the_model_as_it_was():
    model = llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    scoring.score(model, language_batches(1), "fisher")
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert (parameter.requires_grad, True) == (before[name][0], torch.equal(parameter, before[name][1]))


def test_merging_batches_equals_one_pass_in_any_cut():
    model, batches = llama(), language_batches(4)
    observe = lambda part: scoring.observe(model, part, {"gate_gradient", "weights"}, loss_fn=per_sample_loss)  # noqa: E731
    whole, first, second = observe(batches), observe(batches[:1]), observe(batches[1:])
    merged = first + second
    for name in whole:
        assert torch.equal(merged[name].gate_gradient, whole[name].gate_gradient)
        assert torch.equal(merged[name].weight_l1, whole[name].weight_l1)


def test_observations_survive_the_disk(tmp_path):
    observed = scoring.observe(bert(), [], {"weights"})
    observed.save(tmp_path / "observed.safetensors")
    again = Observations.load(tmp_path / "observed.safetensors")
    assert list(again) == list(observed)
    for name in observed:
        assert again[name].shape == observed[name].shape
        assert torch.equal(again[name].weight_l2, observed[name].weight_l2)
        assert again[name].gate_gradient is None
    assert [path.name for path in tmp_path.iterdir()] == ["observed.safetensors"]
    with pytest.raises(InvalidInput, match="cannot be read"):
        Observations.load(tmp_path / "none.safetensors")


def test_scores_survive_the_disk_to_the_last_bit(tmp_path):
    scores = scoring.score(llama(), language_batches(), "fisher")
    scores.save(tmp_path / "scores.json")
    again = HeadScores.load(tmp_path / "scores.json")
    assert again.criterion == "fisher"
    assert again.shapes == scores.shapes
    assert all(torch.equal(again[name], scores[name]) for name in scores)
    assert "fisher" in str(again)


def test_newer_scores_are_refused(tmp_path):
    path = tmp_path / "scores.json"
    scoring.score(llama(), criterion="random").save(path)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(CorruptCheckpoint, match="schema version 2"):
        HeadScores.load(path)


def test_random_scores_are_seeded_and_differ_between_layers():
    first, second = (scoring.score(llama(), criterion="random") for _ in range(2))
    names = list(first)
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert not torch.equal(first[names[0]], first[names[1]])


def test_gating_a_head_of_score_zero_costs_nothing():
    """A head whose output projection is zero has no gate gradient, and no other head is like it."""
    model = llama()
    model.model.layers[0].self_attn.o_proj.weight.data[:, 8:16] = 0.0
    scores = scoring.score(model, language_batches(), "fisher")["model.layers.0.self_attn"]
    assert scores[1] == 0.0
    assert (scores > 0).sum() == 7
    ids = tokens()
    with torch.no_grad(), gated(model, {"model.layers.0.self_attn": [0, 2, 3, 4, 5, 6, 7]}):
        without = model(input_ids=ids).logits
    assert torch.allclose(without, model(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"criterion": "fischer"}, "Did you mean 'fisher'"),
        ({"criterion": "fisher", "batches": []}, "calibration set is empty"),
        ({"criterion": "fisher", "normalize": "layer"}, "unknown normalization"),
        ({"criterion": "fisher", "loss_fn": lambda model, batch: torch.tensor(float("nan"), requires_grad=True)}, "NaN"),
        ({"criterion": "fisher", "loss_fn": lambda model, batch: torch.tensor(1.0)}, "does not depend"),
        ({"criterion": "fisher", "loss_fn": lambda model, batch: torch.tensor(1.0, requires_grad=True)}, "not reached"),
        ({"criterion": "fisher", "batches": [{"input_ids": tokens()}]}, "no loss"),
        ({"criterion": "fisher", "batches": [3]}, "expected a dict"),
        ({"criterion": []}, r"criterion is \[\]; expected the name of one or a list of names; hp\.criteria\(\) has them"),
        ({"criterion": "fisher", "loss_fn": scoring.causal_losses, "batches": [{"input_ids": tokens()}]}, "has no labels"),
        ({"criterion": "fisher", "distributed": "all"}, "unknown value of distributed 'all'"),
    ],
)
def test_bad_input_is_named(arguments, names):
    with pytest.raises(InvalidInput, match=names):
        scoring.score(llama(), **{"batches": language_batches(1), **arguments})


def test_observations_that_do_not_fit_are_named(tmp_path):
    observed = scoring.observe(llama(), language_batches(1), {Need.GRAM})
    for other in (llama(layers=1), llama(query_heads=4)):
        with pytest.raises(InvalidInput, match="observations of different models cannot be merged"):
            observed + scoring.observe(other, language_batches(1), {Need.GRAM})
    with pytest.raises(InvalidInput, match=r"fisher needs gate_gradient, which was not observed at model.*; observe with needs="):
        scoring.score_observations(observed, "fisher")
    save_file({}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidInput, match=r"other\.safetensors holds no observations that this headprune reads"):
        Observations.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda values: values.popitem(), "scores and shapes must name the same sites"),
        (lambda values: values.update({SITE: torch.ones(3)}), rf"scores of {SITE} have shape \[3\]; expected \[8\]"),
    ],
)
def test_scores_that_do_not_fit_their_sites_are_named(change, names):
    scores = scoring.score(llama(), criterion="random")
    values = dict(scores)
    change(values)
    with pytest.raises(InvalidInput, match=names):
        HeadScores("random", values, scores.shapes)


def test_nan_scores_are_refused_with_their_heads():
    scores = scoring.score(llama(), criterion="random")
    values = {name: found.clone() for name, found in scores.items()}
    values["model.layers.1.self_attn"][3] = float("nan")
    with pytest.raises(InvalidInput, match=r"model\.layers\.1\.self_attn are NaN for heads \[3\]"):
        HeadScores("random", values, scores.shapes)


def test_a_new_criterion_is_five_lines():
    @scoring.criterion("first_heads", needs=(), source="this test", cost="no data")
    def first_heads(observed):
        """Keeps the first heads."""
        return -torch.arange(observed.shape.head_map.query_heads).float()

    assert "first_heads" in scoring.criteria()
    assert scoring.score(bert(), criterion="first_heads")["encoder.layer.0.attention"].tolist() == [0, -1, -2, -3]
