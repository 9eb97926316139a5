"""VariableHeadAttention against torch.nn.MultiheadAttention, for every way of calling it."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.nn import VariableHeadAttention

EMBED, HEADS, BATCH, LENGTH, KV_LENGTH = 12, 4, 3, 5, 7
FORMS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "widths": {"kdim": 6, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10, "bias": False},
}


def torch_layer(seed=0, **options) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def inputs(layer, batched=True, length=LENGTH):
    torch.manual_seed(1)
    made = []
    for tokens, width in zip((length, KV_LENGTH, KV_LENGTH), (layer.embed_dim, layer.kdim, layer.vdim)):
        shape = (BATCH, tokens, width) if layer.batch_first else (tokens, BATCH, width)
        made.append(torch.randn(shape if batched else (tokens, width)))
    return made


def masks(kind, length, kv_length, batched=True):
    """(attn_mask, key_padding_mask) of a kind such as "bool2 float"; no row is hidden altogether."""
    torch.manual_seed(2)
    attn, padding = kind.split()
    batch = BATCH if batched else 1

    def made(name, shape):
        if name == "none":
            return None
        if name.startswith("float"):
            return torch.randn(shape).masked_fill(hidden(shape), float("-inf"))
        return hidden(shape)

    def hidden(shape):
        found = torch.rand(shape) > 0.6
        found[..., 0] = False
        return found

    attn_shape = (batch * HEADS, length, kv_length) if attn.endswith("3") else (length, kv_length)
    return made(attn, attn_shape), made(padding, (batch, kv_length) if batched else (kv_length,))


def same_outputs(ours, theirs, atol=1e-6):
    assert (ours[1] is None) == (theirs[1] is None)
    for mine, other in zip(ours, theirs):
        if mine is not None:  # entries near zero are sums of large ones: rounding goes with the largest
            assert torch.allclose(mine, other, atol=atol * max(1.0, float(other.abs().max())))


KINDS = [" ".join(pair) for pair in itertools.product(("none", "bool2", "float2", "bool3", "float3"), ("none", "bool", "float"))]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_in_every_form(form, kind):
    theirs = torch_layer(**FORMS[form])
    ours = VariableHeadAttention.from_torch(theirs)
    for batched, weights in itertools.product((True, False), ({"need_weights": False}, {}, {"average_attn_weights": False})):
        arguments = inputs(theirs, batched)
        mask, padding = masks(kind, LENGTH, KV_LENGTH, batched)
        call = {"attn_mask": mask, "key_padding_mask": padding, **weights}
        same_outputs(ours(*arguments, **call), theirs(*arguments, **call))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("length", [LENGTH, KV_LENGTH, KV_LENGTH + 1, KV_LENGTH + 2])
def test_the_causal_hint(form, padding, length):
    """Also where the learned and the zero key make as many keys as queries."""
    theirs = torch_layer(**FORMS[form])
    ours = VariableHeadAttention.from_torch(theirs)
    arguments = inputs(theirs, length=length)
    mask = torch.ones(length, KV_LENGTH).triu(1).bool()
    _, padding = masks(f"none {padding}", LENGTH, KV_LENGTH)
    for need_weights in (True, False):
        call = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True, "need_weights": need_weights}
        same_outputs(ours(*arguments, **call), theirs(*arguments, **call))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_and_dropout_are_those_of_torch(form):
    theirs = torch_layer(**FORMS[form], dropout=0.3).train()
    ours = VariableHeadAttention.from_torch(theirs)
    mask, padding = masks("float2 float", LENGTH, KV_LENGTH)
    for need_weights in (True, False):
        results = []
        for layer in (ours, theirs):
            arguments = [tensor.requires_grad_() for tensor in inputs(theirs)]
            torch.manual_seed(4)
            output, _ = layer(*arguments, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
            layer.zero_grad()
            output.square().sum().backward()
            results.append([output, *(tensor.grad for tensor in arguments), layer.out_proj.weight.grad])
        same_outputs(*results, atol=1e-5)
    expected = theirs.q_proj_weight.grad if theirs.in_proj_weight is None else theirs.in_proj_weight.grad[:EMBED]
    assert torch.allclose(ours.q_proj.weight.grad, expected, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_output_of_a_layer_that_takes_lengths_first_can_be_viewed(need_weights):
    layer = VariableHeadAttention(EMBED, HEADS)
    output, _ = layer(*inputs(layer), need_weights=need_weights)
    assert output.view(LENGTH * BATCH, EMBED).shape == (LENGTH * BATCH, EMBED)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_a_row_that_may_attend_to_nothing_gives_the_bias_alone(added, need_weights):
    layer = VariableHeadAttention.from_torch(torch_layer(batch_first=True))
    padding = torch.zeros(BATCH, KV_LENGTH, dtype=torch.bool)
    padding[1] = True
    mask = torch.zeros(padding.shape).masked_fill(padding, float("-inf")) if added else padding
    output, _ = layer(*inputs(layer), key_padding_mask=mask, need_weights=need_weights)
    assert torch.allclose(output[1], layer.out_proj.bias.expand(LENGTH, EMBED))
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_draws_the_same_weights(form):
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **FORMS[form])
    torch.manual_seed(7)
    ours = VariableHeadAttention(EMBED, HEADS, **FORMS[form])
    expected = VariableHeadAttention.from_torch(theirs).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_weights_travel_both_ways(form):
    theirs = torch_layer(**FORMS[form]).eval()
    ours = VariableHeadAttention(EMBED, HEADS, gate=True, **FORMS[form])
    nn.Sequential(ours).load_state_dict(nn.Sequential(theirs).state_dict())
    assert (ours.gate == 1).all()
    ours.gate = None
    back = ours.eval().to_torch()
    assert not back.training
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    same_outputs(ours(*inputs(theirs)), theirs(*inputs(theirs)))


def test_from_torch_copies_and_keeps_what_is_frozen():
    theirs = torch_layer(dtype=torch.float64).eval()
    theirs.out_proj.requires_grad_(False)
    ours = VariableHeadAttention.from_torch(theirs)
    assert (ours.training, ours.q_proj.weight.dtype) == (False, torch.float64)
    assert ours.q_proj.weight.requires_grad
    assert not ours.out_proj.weight.requires_grad
    theirs.out_proj.bias.requires_grad_()
    theirs.in_proj_bias.requires_grad_(False)
    frozen = {
        name for name, parameter in VariableHeadAttention.from_torch(theirs).named_parameters() if not parameter.requires_grad
    }
    assert frozen == {"out_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias"}
    back = VariableHeadAttention.from_torch(theirs).to_torch()
    assert {name for name, one in back.named_parameters() if not one.requires_grad} == {"out_proj.weight", "in_proj_bias"}
    theirs.in_proj_weight.data.zero_()
    theirs.out_proj.weight.data.zero_()
    assert (ours.v_proj.weight != 0).any()
    assert (ours.out_proj.weight != 0).any()


def test_weights_that_something_makes_are_refused():
    layer = torch_layer()
    prune.identity(layer, "in_proj_weight")
    with pytest.raises(InvalidInput, match=r"layer is Linear\(.*; expected MultiheadAttention"):
        VariableHeadAttention.from_torch(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="the MultiheadAttention holds in_proj_weight_orig beside its weights; undo masks"):
        VariableHeadAttention.from_torch(layer)


def test_a_layer_made_without_memory_is_whole_after_reset_parameters():
    layer = VariableHeadAttention(EMBED, HEADS, gate=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.kv_of_query.tolist() == [0, 1, 2, 3]
    assert (layer.gate == 1).all()


def ragged_layer(**options) -> VariableHeadAttention:
    torch.manual_seed(0)
    layer = VariableHeadAttention(
        EMBED, 5, head_dim=6, head_map=HeadMap((0, 0, 0, 1, 2), 3), batch_first=True, gate=True, **options
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False, "kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_pruning_equals_gates_at_zero_and_composes(options, need_weights):
    layer = ragged_layer(**options)
    arguments = inputs(layer)
    whole = copy.deepcopy(layer)
    whole.gate.data[[0, 3]] = 0.0
    expected, _ = whole(*arguments, need_weights=need_weights)
    once, twice = copy.deepcopy(layer).prune([4, 1, 2]), layer.prune([1, 2, 3, 4]).prune([0, 1, 3])
    assert (once.head_map, once.num_heads, once.num_kv_heads) == (HeadMap((0, 0, 1), 2), 3, 2)
    assert once.out_proj.in_features == once.q_proj.out_features == 18
    found, weights = once(*arguments, need_weights=need_weights, average_attn_weights=False)
    assert torch.allclose(found, expected, atol=1e-5)
    assert weights is None or weights.shape[1] == 3
    assert torch.equal(twice(*arguments, need_weights=need_weights)[0], found)


def test_a_pruned_layers_weights_load_into_a_whole_one_and_the_other_way_round():
    whole, pruned = ragged_layer(add_bias_kv=True), ragged_layer(add_bias_kv=True).prune([1, 2, 4])
    before, after = copy.deepcopy(whole), copy.deepcopy(pruned)
    pruned.load_state_dict(before.state_dict())
    whole.load_state_dict(after.state_dict())
    arguments = inputs(whole)
    assert torch.equal(whole(*arguments)[0], after(*arguments)[0])
    assert torch.equal(pruned(*arguments)[0], before(*arguments)[0])


def test_torch_weights_do_not_load_into_a_pruned_layer():
    layer = VariableHeadAttention(EMBED, HEADS).prune([0, 2])
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(torch_layer().state_dict())


def test_heads_of_another_size_are_named_by_their_shapes_and_change_nothing():
    layer = VariableHeadAttention(EMBED, HEADS)
    for head_dim in (1, 2, 4):
        with pytest.raises(RuntimeError, match=r"size mismatch for k_proj.weight: copying a param with shape"):
            layer.load_state_dict(VariableHeadAttention(EMBED, HEADS, head_dim=head_dim).state_dict())
    assert layer.head_map == HeadMap.uniform(HEADS)
    assert layer.k_proj.weight.shape == (EMBED, EMBED)


def test_a_layer_cast_with_its_buffers_loads_what_it_saved():
    layer = ragged_layer().type(torch.float64)
    whole = VariableHeadAttention(EMBED, HEADS, head_dim=6, gate=True, dtype=torch.float64)
    whole.load_state_dict(layer.state_dict())
    assert whole.head_map == layer.head_map


CUTS = {
    "prune": lambda layer: layer.prune([0]),
    "load": lambda layer: layer.load_state_dict(VariableHeadAttention(EMBED, HEADS).prune([0]).state_dict()),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_layer_cut_in_inference_mode_can_be_trained(cut):
    layer = VariableHeadAttention(EMBED, HEADS)
    with torch.inference_mode():
        CUTS[cut](layer)
    layer(*inputs(layer))[0].sum().backward()
    assert layer.q_proj.weight.grad.shape == layer.q_proj.weight.shape == (EMBED // HEADS, EMBED)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda layer: parametrizations.spectral_norm(layer.out_proj), "out_proj.weight"),
        (lambda layer: prune.identity(layer.v_proj, "bias"), "v_proj.bias"),
        (lambda layer: prune.identity(layer, "bias_k"), "bias_k"),
        (lambda layer: setattr(layer, "k_proj", nn.Sequential(layer.k_proj)), "k_proj.weight"),
    ],
)
def test_weights_that_something_makes_are_neither_cut_nor_given_to_torch(make, name, cut):
    layer = VariableHeadAttention(EMBED, HEADS, add_bias_kv=True)
    make(layer)
    with pytest.raises(InvalidInput, match=f"{name} is made of others at each call; undo masks"):
        layer.to_torch()
    before = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    with pytest.raises(InvalidInput, match=f"{name} is made of others at each call; undo masks"):
        CUTS[cut](layer)
    assert {name: tensor.shape for name, tensor in layer.state_dict().items()} == before


def test_a_pruned_layer_is_copied_pickled_and_moved():
    layer = ragged_layer().prune([1, 2, 4])
    arguments = inputs(layer)
    expected = layer(*arguments)[0]
    assert torch.equal(pickle.loads(pickle.dumps(layer))(*arguments)[0], expected)
    moved = layer.to(torch.float64)
    assert moved.kv_of_query.tolist() == [0, 0, 1]
    assert torch.allclose(moved(*[tensor.double() for tensor in arguments])[0].float(), expected, atol=1e-5)


def test_autocast_runs_it_in_low_precision():
    layer = ragged_layer()
    for need_weights in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = layer(*inputs(layer), need_weights=need_weights)
        assert found.dtype == torch.bfloat16
        expected, _ = layer(*inputs(layer), need_weights=need_weights)
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_it_compiles_whole_and_exports():
    layer = ragged_layer().eval()
    arguments = (*inputs(layer), torch.arange(KV_LENGTH).expand(BATCH, -1) > 4, False)
    expected = layer(*arguments)[0]
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)[0], expected, atol=1e-6)
    assert torch.allclose(torch.export.export(layer, arguments).module()(*arguments)[0], expected, atol=1e-6)


def test_one_compilation_takes_masks_of_fixed_size_beside_free_sizes():
    """Lengths have become free by the time that a mask is seen for the first time, whose sizes are fixed at that."""
    layer = ragged_layer().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for length, masked in ((4, False), (6, False), (6, True), (9, True)):
        x = torch.randn(length, length + 1, EMBED)
        padding = torch.arange(length + 1).expand(length, -1) > 2 if masked else None
        arguments = (x, x, x, padding, False, torch.randn(length + 1, length + 1) if masked else None)
        assert torch.allclose(compiled(*arguments)[0], layer(*arguments)[0], atol=1e-6)


def test_tracers_that_do_not_take_it_are_told_of_those_that_do():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ragged_layer()

        def forward(self, x):
            return self.layer(x, x, x, need_weights=False)[0]

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, VariableHeadAttention) or super().is_leaf_module(module, name)

    model, x = Around().eval(), torch.randn(2, 5, EMBED)
    with pytest.raises(
        InvalidInput, match=r"torch\.jit\.script does not take a Var.*; torch\.export\.export and torch\.compile do"
    ):
        torch.jit.script(model)
    with pytest.raises(
        InvalidInput, match=r"torch\.fx\.symbolic_trace does not .*, and a Tracer whose is_leaf_module keeps it whole"
    ):
        torch.fx.symbolic_trace(model)
    assert torch.equal(torch.fx.GraphModule(model, Whole().trace(model))(x), model(x))
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_torchs_onnx_exporter_takes_it(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ragged_layer()

        def forward(self, x, padding):
            return self.layer(x, x, x, padding, need_weights=False)[0]

    def example(batch, length):
        return torch.randn(batch, length, EMBED), torch.arange(length).expand(batch, -1) > 2

    model, free = Alone().eval(), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.onnx.export(model, example(3, 5), dynamo=True, dynamic_shapes=(free, free), verbose=False)
    program.save(str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    arguments = example(2, 7)
    found = session.run(None, {one.name: value.numpy() for one, value in zip(session.get_inputs(), arguments)})
    assert torch.allclose(torch.from_numpy(found[0]), model(*arguments), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"embed_dim": 10}, "does not divide"),
        ({"head_map": HeadMap((0, 1), 2)}, "head_map is 2q/2kv"),
        ({"num_kv_heads": 3}, "evenly"),
        ({"num_heads": 0}, "num_heads=0"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments, names):
    with pytest.raises(InvalidInput, match=names):
        VariableHeadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **arguments})


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({"is_causal": True}, "attn_mask"),
        ({"attn_mask": torch.zeros(BATCH * 3, LENGTH, KV_LENGTH)}, r"attn_mask has shape \[9, 5, 7\]"),
        ({"attn_mask": torch.zeros(LENGTH, KV_LENGTH, dtype=torch.long)}, "attn_mask is torch.int64"),
        ({"key_padding_mask": torch.zeros(KV_LENGTH, BATCH).bool()}, "key_padding_mask has shape"),
        ({"query": torch.zeros(LENGTH, EMBED)}, "dimensions"),
        ({"key": torch.zeros(KV_LENGTH, BATCH, 8)}, "key has 8 features"),
        ({"value": torch.zeros(2, BATCH, EMBED)}, "all but the features"),
        (
            {name: torch.zeros(KV_LENGTH, 1, EMBED) for name in ("key", "value")},
            r"query is \[5, 3, 12\], key \[7, 1, 12\], length first; both must have the same batch",
        ),
    ],
)
def test_calls_that_do_not_fit_are_named(call, names):
    layer = VariableHeadAttention(EMBED, HEADS)
    arguments = dict(zip(("query", "key", "value"), inputs(layer)))
    with pytest.raises(InvalidInput, match=names):
        layer(**{**arguments, **call})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_of_another_precision_is_taken(need_weights, dropout):
    layer = VariableHeadAttention(EMBED, HEADS, dropout=dropout).train()
    arguments, mask = inputs(layer), torch.randn(LENGTH, KV_LENGTH)
    outputs = []
    for kind in (torch.float32, torch.float64):
        torch.manual_seed(0)
        outputs.append(layer(*arguments, attn_mask=mask.to(kind), need_weights=need_weights)[0])
    torch.testing.assert_close(*outputs)


def test_a_layer_without_torch_form_says_why():
    with pytest.raises(InvalidInput, match="pruned"):
        VariableHeadAttention(EMBED, HEADS).prune([0]).to_torch()
    with pytest.raises(InvalidInput, match="gates"):
        VariableHeadAttention(EMBED, HEADS, gate=True).to_torch()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_a_layer_without_heads_gives_its_output_bias(batched, gate):
    layer = VariableHeadAttention(EMBED, HEADS, batch_first=True, gate=gate).prune([])
    layer.out_proj.bias.data.normal_()
    x = torch.randn(2, 5, EMBED) if batched else torch.randn(5, EMBED)
    output, weights = layer(x, x, x)
    assert torch.equal(output, layer.out_proj.bias.expand_as(output))
    assert weights.shape == (*x.shape[:-1], 5)
    assert not weights.any()
    again = VariableHeadAttention(EMBED, HEADS, batch_first=True, gate=gate)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, x, x, need_weights=False)[0], output)
    assert str(again.prune([]).head_map) == "no heads"


@pytest.mark.parametrize("averaged", [True, False])
def test_the_weights_of_a_layer_without_heads_have_the_shape_of_others(averaged):
    layer = VariableHeadAttention(EMBED, HEADS, add_bias_kv=True, add_zero_attn=True)
    arguments = inputs(layer)
    expected = layer(*arguments, average_attn_weights=averaged)[1].shape
    found = layer.prune([])(*arguments, average_attn_weights=averaged)[1].shape
    assert found == (expected if averaged else (expected[0], 0, *expected[2:]))
