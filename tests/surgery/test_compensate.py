import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import ENCODERS
from tiny_models import bert, llama, repeated, tokens
from torch import nn

from headprune.errors import InvalidInput
from headprune.models import attention_sites, gated
from headprune.planning import PruningPlan
from headprune.surgery import compensate, prune, resolve_outputs
from headprune.surgery.normal_equations import Layer, NormalEquations, factored, get_solver

THREE_HEADS, TWO_HEADS = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1])  # of the inputs of a projection
END = {bert: "output.dense", llama: "mlp.down_proj"}


def batches_for(count: int = 10) -> list[dict]:
    ids = [tokens(6, 16, seed) for seed in range(count)]
    return [{"input_ids": found, "attention_mask": torch.ones_like(found)} for found in ids]


def output_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize(
    ("make", "keep"),
    [
        (llama, {"model.layers.0.self_attn": [0, 3, 5], "model.layers.1.self_attn": [1, 2, 7]}),
        (bert, {"encoder.layer.0.attention": [1, 2], "encoder.layer.1.attention": [0, 3]}),
    ],
)
def test_compensation_brings_the_output_nearer_to_the_dense_one_on_unseen_data(make, keep):
    dense, plain, solved = make(), make(), make()
    prune(plain, PruningPlan.from_keep(plain, keep))
    reports = prune(solved, PruningPlan.from_keep(solved, keep), batches_for(30))
    unseen = {"input_ids": tokens(8, 16, seed=99)}
    expected = output_of(dense, unseen)
    assert (output_of(solved, unseen) - expected).norm() < 0.95 * (output_of(plain, unseen) - expected).norm()
    assert [report.site for report in reports] == list(keep)
    assert all(report.error_after <= report.error_before for report in reports)


@pytest.mark.parametrize("feed_forward", [False, True])
@pytest.mark.parametrize(("make", "layers", "times", "better"), [(bert, 1, 6, 0.4), (llama, 1, 6, 0.6), (llama, 2, 4, 0.6)])
def test_a_layer_that_runs_several_times_is_re_solved_over_all_its_calls(make, layers, times, better, feed_forward):
    """From its first call alone a BERT came out worse than one that is only cut."""
    dense, plain, solved = (repeated(make, layers, times) for _ in range(3))
    keep = {site.name: list(range(0, site.head_map.query_heads, 2)) for site in attention_sites(dense)}
    prune(plain, PruningPlan.from_keep(plain, keep))
    prune(solved, PruningPlan.from_keep(solved, keep), batches_for(30), feed_forward=feed_forward)
    unseen = {"input_ids": tokens(8, 16, seed=99)}
    expected = output_of(dense, unseen)
    assert (output_of(solved, unseen) - expected).norm() < better * (output_of(plain, unseen) - expected).norm()


class TwoLayers(nn.Module):
    """`first`, then `second`; `declared`: the order in which the module has them."""

    def __init__(self, declared: tuple[str, str]) -> None:
        super().__init__()
        for name in declared:
            torch.manual_seed(len(name))
            setattr(self, name, nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True))

    def forward(self, x):
        return self.second(self.first(x))


def test_layers_are_re_solved_in_the_order_of_the_pass_however_they_are_declared():
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(4, 16, 32, generator=generator)} for _ in range(10)]
    keep = {"first.self_attn": [0, 2], "second.self_attn": [1]}
    found = {}
    for declared in (("first", "second"), ("second", "first")):
        model = TwoLayers(declared).eval()
        reports = prune(model, PruningPlan.from_keep(model, keep), batches)
        assert [report.site for report in reports] == list(keep)
        found[declared] = model(batches[0]["x"])
    torch.testing.assert_close(*found.values())


@pytest.mark.parametrize(
    ("make", "behind"), [(llama, "model.layers.1.post_attention_layernorm"), (bert, "encoder.layer.1.attention.output.LayerNorm")]
)
def test_a_layer_takes_back_what_the_layers_before_it_left_wrong(make, behind, monkeypatch):
    """Both solve layer 0 alike; with only its own output as the target, layer 1 leaves more error in the stream."""
    dense, followed, alone = make(), make(), make()
    keep = {site.name: [0, 3] for site in attention_sites(dense)}
    prune(followed, PruningPlan.from_keep(followed, keep), batches_for(15))
    monkeypatch.setattr(compensate, "residual_streams", lambda *_: {})
    prune(alone, PruningPlan.from_keep(alone, keep), batches_for(15))
    expected = [received(dense, behind, batch) for batch in batches_for(15)]
    errors = [
        sum(float((received(model, behind, batch) - states).square().sum()) for batch, states in zip(batches_for(15), expected))
        for model in (followed, alone)
    ]
    assert torch.equal(*(attention_sites(model)[0].output.module.weight for model in (followed, alone)))
    assert errors[0] < 0.98 * errors[1]


def received(model, name: str, batch) -> torch.Tensor:
    """What the module `name` receives."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    output_of(model, batch)
    handle.remove()
    return found[0]


def test_the_normal_equations_give_the_ridge_solution():
    torch.manual_seed(0)
    inputs, residual, ridge = torch.randn(50, 6), torch.randn(50, 4), 0.1
    equations = NormalEquations.empty(6, 4)
    for part in torch.arange(50).split(17):
        equations.add(inputs[part], residual[part])
    found = equations.solve(ridge, bias=True)
    # The same by a stacked least-squares problem in fp64; the bias column carries almost no penalty.
    padded = torch.cat([inputs, torch.ones(50, 1)], dim=1).double()
    penalty = torch.full((7,), (ridge * inputs.double().square().sum(0).mean()).item()).double().sqrt()
    penalty[-1] = (1e-9 * 50) ** 0.5
    stacked = torch.cat([padded, torch.diag(penalty)])
    expected = torch.linalg.lstsq(stacked, torch.cat([residual.double(), torch.zeros(7, 4).double()])).solution
    assert torch.allclose(found, expected, atol=1e-5)
    error = (residual.double() - padded @ found).square().sum()
    assert equations.error(found) == pytest.approx(float(error), rel=1e-4)
    assert equations.solve(ridge, bias=False)[-1].abs().max() == 0


def drawn(tokens: int, inputs: int = 6, outputs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs [tokens, inputs], residual [tokens, outputs]) that a linear layer explains in part."""
    x = torch.randn(tokens, inputs)
    return x, x @ torch.randn(inputs, outputs) + torch.randn(tokens, outputs)


def test_the_equations_of_some_columns_are_those_of_their_inputs_and_of_what_their_weights_leave():
    torch.manual_seed(0)
    x, residual = drawn(50)
    columns, weight, counts = torch.tensor([0, 2, 5]), torch.randn(4, 3), torch.rand(50)
    whole, part = NormalEquations.empty(6, 4), NormalEquations.empty(3, 4)
    whole.add(x, residual, counts)
    part.add(x[:, columns], residual - x[:, columns] @ weight.T, counts)
    found = whole.about(columns, weight)
    for name in ("gram", "cross", "squares"):
        torch.testing.assert_close(getattr(found, name), getattr(part, name), rtol=1e-4, atol=1e-4)
    assert found.tokens == 50


def test_what_the_held_out_tokens_have_chosen_is_solved_once_more_with_them():
    torch.manual_seed(0)
    x, residual = drawn(70)
    train, held_out = NormalEquations.empty(6, 4), NormalEquations.empty(6, 4)
    train.add(x[:40], residual[:40])
    held_out.add(x[40:], residual[40:])
    old, part = (torch.zeros(4, 6, dtype=torch.float64), None), SimpleNamespace(name="feed-forward")
    for join, used in ((False, 40), (True, 70)):
        report, (weight, _) = compensate.resolve(part, None, old, train, held_out, get_solver("least_squares"), join)
        gram, cross = (x[:used].T @ x[:used]).double(), (x[:used].T @ residual[:used]).double()
        damped = gram + report.ridge * gram.diagonal().mean() * torch.eye(6)
        torch.testing.assert_close(weight.T, torch.linalg.solve(damped, cross), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "count"), [(bert, 1), (bert, 2), (bert, 4), (llama, 1), (llama, 3)])
def test_few_batches_are_judged_by_what_was_not_learnt(make, count):
    """The last of few was learnt from as well, so that the smallest ridge won; two batches left MiniLM worse than a cut."""
    model = make()
    keep = {site.name: [0, 3] for site in attention_sites(model)}
    reports = compensate.resolve_outputs(model, attention_sites(model), keep, batches_for(count))
    assert all(report.ridge is None or report.ridge > 1e-3 for report in reports)
    assert any(report.ridge for report in reports)


def test_of_several_batches_whole_ones_are_held_out_of_a_single_one_some_samples():
    valid = torch.tensor([[True, True, False]] * 6)
    held = lambda index, batches, **options: [  # noqa: E731
        part.any(dim=1).nonzero().flatten().tolist() for part in compensate.shares_of(valid, index, batches, **options)
    ]
    every = list(range(6))
    assert [held(index, 6)[1] == every for index in range(6)] == [False, False, False, False, True, False]
    assert [held(index, 3)[1] == every for index in range(3)] == [False, False, True]
    assert [held(index, 3, every=3)[0] == [] for index in range(3)] == [False, False, True]
    assert held(0, 1) == [[0, 1, 2, 3, 5], [4]]
    # A piece of a batch of 30 samples, then of 4.
    assert held(0, 1, rows=torch.tensor([3, 4, 9, 10, 11, 29]), samples=30) == [[0, 3, 4], [1, 2, 5]]
    assert held(0, 1, rows=torch.tensor([0, 1, 2, 2, 1, 3]), samples=4) == [[0, 1, 2, 3, 4], [5]]
    one = valid[:1]
    assert [part.tolist() for part in compensate.shares_of(one, 0, 1)] == [one.tolist(), [[False] * 3]]  # there is no other
    packed = compensate.shares_of(valid[0], 0, 1)
    assert [int(part.sum()) for part in packed] == [2, 0]


@pytest.mark.parametrize("method", ["least_squares", "mask_tuning", "bias"])
@pytest.mark.parametrize("spoilt", [0, 4])
def test_activations_that_are_not_finite_are_refused_wherever_they_are(method, spoilt):
    """In the batch that is held out, and by other methods in any, nothing was re-solved and nobody told."""
    model, batches = bert(), batches_for(5)
    model.embeddings.word_embeddings.weight.data[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    batches[spoilt]["input_ids"][0, 0] = 0
    keep = {site.name: [0, 3] for site in attention_sites(model)}
    with pytest.raises(InvalidInput, match="calibration activations are NaN or infinite"):
        compensate.resolve_outputs(model, attention_sites(model), keep, batches, method=method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("empty", [0, 1])
def test_a_batch_without_a_token_that_counts_neither_teaches_nor_judges(empty):
    model, batches = bert(), batches_for(2)
    keep = {site.name: [0, 3] for site in attention_sites(model)}
    masks = {id(batch): torch.full((6, 16), index != empty) for index, batch in enumerate(batches)}
    reports = compensate.resolve_outputs(model, attention_sites(model), keep, batches, token_mask=lambda batch: masks[id(batch)])
    assert all(report.ridge for report in reports)


@pytest.mark.parametrize("lengths", [(2, 7), (64, 1), (5, 5)])
def test_every_sample_counts_alike_however_long_it_is(lengths):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    of_samples = compensate.sample_weights(valid).split(lengths)
    assert [float(weights.sum()) for weights in of_samples] == pytest.approx([64.0, 64.0])
    assert all((weights == weights[0]).all() for weights in of_samples)


def test_a_redundant_head_is_replaced_without_loss():
    """Two heads that give the same output: the one that stays takes over the other's columns."""
    model = bert(layers=1)
    inner, dense = model.encoder.layer[0].attention.self, model.encoder.layer[0].attention.output.dense
    for projection in (inner.query, inner.key, inner.value):
        projection.weight.data[8:16] = projection.weight.data[:8]
        projection.bias.data[8:16] = projection.bias.data[:8]
    pruned = copy.deepcopy(model)
    (report,) = prune(pruned, PruningPlan.from_keep(model, {"encoder.layer.0.attention": [0, 2, 3]}), batches_for(20))
    assert report.error_after < 1e-4
    unseen = {"input_ids": tokens(4, 16, seed=50)}
    assert torch.allclose(output_of(pruned, unseen), output_of(model, unseen), atol=0.02)
    assert dense.weight.shape == (32, 32)


def test_padded_tokens_do_not_count():
    keep = {"encoder.layer.0.attention": [1, 2], "encoder.layer.1.attention": [0, 3]}
    short, long = bert(), bert()
    batches = batches_for()
    padding = torch.zeros(6, 5, dtype=torch.long)
    longer = [{name: torch.cat([values, padding], dim=1) for name, values in batch.items()} for batch in batches]
    prune(short, PruningPlan.from_keep(short, keep), batches)
    prune(long, PruningPlan.from_keep(long, keep), longer)
    for first, second in zip(attention_sites(short), attention_sites(long)):
        assert torch.allclose(first.output.module.weight, second.output.module.weight, atol=1e-4)


def test_a_resolve_that_does_not_help_is_not_applied():
    """Removed heads that give pure noise to the layer cannot be explained by the others."""
    model = bert(layers=1)
    dense = model.encoder.layer[0].attention.output.dense
    dense.weight.data[:, 8:] = 0.0  # heads 1, 2, 3 do nothing: the removal changes nothing
    before = dense.weight[:, :8].clone()
    (report,) = prune(model, PruningPlan.from_keep(model, {"encoder.layer.0.attention": [0]}), batches_for())
    assert report.ridge is None
    assert torch.equal(dense.weight, before)


def test_the_weights_of_a_failed_compensation_are_put_back():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    plan = PruningPlan.from_keep(model, {"model.layers.0.self_attn": [0], "model.layers.1.self_attn": [0]})
    with pytest.raises(InvalidInput, match="calibration set is empty"):
        prune(model, plan, [])
    calls = []

    def fails_later(model, batch):
        calls.append(batch)
        if len(calls) > 50:
            raise RuntimeError("killed")
        model(**batch)

    with pytest.raises(RuntimeError, match="killed"):
        prune(model, plan, batches_for(20), forward=fails_later)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with gated(model, plan):
        assert output_of(model, {"input_ids": tokens()}).isfinite().all()


def test_mask_tuning_is_the_damped_least_squares_of_one_factor_a_head():
    torch.manual_seed(1)
    inputs, weight = torch.randn(200, 6).double(), torch.randn(5, 6).double()
    residual = inputs[:, :2] @ weight[:, :2].T * 0.5 + 0.1 * torch.randn(200, 5)
    equations = NormalEquations.empty(6, 5)
    equations.add(inputs.float(), residual.float())
    ((_, change),) = get_solver("mask_tuning").solve(equations, Layer(weight.float(), THREE_HEADS, False), (1.0,))
    outputs = torch.stack([(inputs[:, 2 * h : 2 * h + 2] @ weight[:, 2 * h : 2 * h + 2].T).flatten() for h in range(3)], dim=1)
    factors = torch.linalg.solve(outputs.T @ outputs + torch.eye(3), outputs.T @ residual.flatten())
    assert factors[0] == pytest.approx(0.5, abs=0.05)
    assert torch.allclose(change[:6], factors.repeat_interleave(2)[:, None] * weight.T, atol=1e-4)
    assert (change[6] == 0).all()


@pytest.mark.parametrize(("factor", "taken"), [(9.5, True), (10.5, False), (-9.5, True), (-10.5, False)])
def test_mask_tuning_takes_factors_from_minus_ten_to_ten(factor, taken):
    torch.manual_seed(1)
    inputs, weight = torch.randn(2000, 6), torch.randn(5, 6)
    equations = NormalEquations.empty(6, 5)
    equations.add(inputs, (factor - 1) * inputs[:, :2] @ weight[:, :2].T)
    assert bool(list(get_solver("mask_tuning").solve(equations, Layer(weight, THREE_HEADS, False), (1.0,)))) == taken


def test_mask_tuning_finds_one_factor_for_both_parts_of_a_head():
    """ConvBERT's heads own features in two places."""
    model = ENCODERS["convbert"].make()
    site = attention_sites(model)[0]
    keep, old = [0, 2, 3], site.output.module.weight.detach().clone()
    (report,) = resolve_outputs(model, [site], {site.name: keep}, batches_for(), method="mask_tuning")
    assert report.ridge is not None
    factors = (site.output.module.weight / old)[:, site.output.features[keep]].detach()  # [hidden, heads, features of a head]
    torch.testing.assert_close(factors, factors[:1, :, :1].expand_as(factors), rtol=1e-3, atol=1e-3)


def test_the_bias_takes_the_mean_of_what_is_missing():
    torch.manual_seed(2)
    inputs, residual = torch.randn(50, 4), torch.randn(50, 3) + 2.0
    equations = NormalEquations.empty(4, 3)
    equations.add(inputs, residual)
    ((_, change),) = get_solver("bias").solve(equations, Layer(torch.randn(3, 4), TWO_HEADS, True), (0.0,))
    assert torch.allclose(change[-1].float(), residual.mean(dim=0), atol=1e-5)
    assert (change[:-1] == 0).all()
    assert list(get_solver("bias").solve(equations, Layer(torch.randn(3, 4), TWO_HEADS, False), (0.0,))) == []


@pytest.mark.parametrize("method", ["mask_tuning", "bias"])
def test_other_compensations_help_but_less_than_least_squares(method):
    keep = {"encoder.layer.0.attention": [1, 2], "encoder.layer.1.attention": [0, 3]}
    errors = {}
    for name in ("least_squares", method):
        model = bert()
        reports = prune(model, PruningPlan.from_keep(model, keep), batches_for(20), compensation=name)
        errors[name] = reports.resolved[0].error_after
    assert errors["least_squares"] < errors[method] < 1.0
    with pytest.raises(InvalidInput, match="unknown compensation"):
        prune(bert(), PruningPlan.from_keep(bert(), keep), batches_for(1), compensation="magic")


def test_too_few_calibration_tokens_are_refused_with_the_number_needed():
    model = bert()
    before = copy.deepcopy(model.state_dict())
    plan = PruningPlan.from_keep(model, {"encoder.layer.1.attention": [0, 2, 3]})  # 24 inputs and a bias
    few = [{"input_ids": tokens(1, 8, seed), "attention_mask": torch.ones(1, 8, dtype=torch.long)} for seed in range(3)]
    with pytest.raises(InvalidInput, match=r"24 calibration tokens at encoder.layer.1.attention; .* need at least 25, better 250"):
        prune(model, plan, few)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune(model, plan, few, compensation="bias")


def test_an_attention_that_loses_nothing_stays_as_it_is_where_tokens_are_too_few():
    model = bert()
    last = model.encoder.layer[1].attention.output.dense.weight
    before, plan = last.detach().clone(), PruningPlan.from_keep(model, {"encoder.layer.0.attention": [1]})  # 8 inputs and a bias
    few = [{"input_ids": tokens(1, 8, seed), "attention_mask": torch.ones(1, 8, dtype=torch.long)} for seed in range(3)]
    reports = {report.site: report for report in prune(model, plan, few).resolved}
    assert reports["encoder.layer.0.attention"].ridge is not None
    assert reports["encoder.layer.1.attention"].ridge is None
    assert torch.equal(last, before)


@pytest.mark.parametrize("make", [bert, llama])
def test_resolving_the_feed_forwards_too_brings_the_output_nearer_still(make):
    dense, alone, both = make(), make(), make()
    keep = {site.name: [0, 3] for site in attention_sites(dense)}
    prune(alone, PruningPlan.from_keep(alone, keep), batches_for(40))
    reports = prune(both, PruningPlan.from_keep(both, keep), batches_for(40), feed_forward=True)
    unseen = {"input_ids": tokens(8, 16, seed=99)}
    expected = output_of(dense, unseen)
    assert (output_of(both, unseen) - expected).norm() < (output_of(alone, unseen) - expected).norm()
    ends = [report.site for report in reports if report.site not in keep]
    assert ends == [f"{'encoder.layer' if make is bert else 'model.layers'}.{layer}.{END[make]}" for layer in range(2)]
    assert all(report.ridge is not None for report in reports)


def test_a_feed_forward_is_left_alone_where_there_are_too_few_tokens():
    model = bert()
    end = model.encoder.layer[1].output.dense
    before = end.weight.clone()
    keep = {"encoder.layer.1.attention": [0, 2]}
    assert end.weight.shape[1] > 32
    few = batches_for(1)[0]["input_ids"][:3, :12]
    reports = prune(model, PruningPlan.from_keep(model, keep), [{"input_ids": few}], feed_forward=True)
    assert torch.equal(end.weight, before)
    assert reports.resolved[-1].ridge is None


def test_attentions_behind_the_first_that_loses_heads_are_resolved_too():
    model = llama(layers=3)
    before = copy.deepcopy(model.state_dict())
    reports = prune(model, PruningPlan.from_keep(model, {"model.layers.1.self_attn": [0, 5]}), batches_for(20))
    assert [report.site for report in reports] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    name = "model.layers.{}.self_attn.o_proj.weight"
    assert torch.equal(model.state_dict()[name.format(0)], before[name.format(0)])
    assert not torch.equal(model.state_dict()[name.format(2)], before[name.format(2)])


def test_a_singular_gram_is_solved_with_the_least_jitter_that_does_and_says_so(caplog):
    rows = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    factor, jitter = factored(rows.T @ rows)
    assert 0 < jitter <= 1e-8
    assert "a singular Gram matrix of 2 inputs" in caplog.text
    expected = rows.T @ rows + jitter * 6 * torch.eye(2)
    assert torch.allclose(factor @ factor.T, expected, rtol=1e-12)
    assert factored(torch.eye(3, dtype=torch.float64))[1] == 0.0
    with pytest.raises(InvalidInput, match="not positive definite"):
        factored(-torch.eye(2, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        factored(torch.full((2, 2), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("method", ["least_squares", "bias", "mask_tuning"])
def test_an_attention_that_loses_all_heads_has_its_bias_at_most(method):
    model, batches = bert(), batches_for()
    plan = {"encoder.layer.0.attention": [], "encoder.layer.1.attention": [0, 2]}
    reports = compensate.resolve_outputs(model, attention_sites(model), plan, batches, method=method)
    assert [report.site for report in reports] == list(plan)
    assert reports[0].error_after <= 1.0
