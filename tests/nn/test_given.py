"""A model that torch.compile wrapped is measured, cut, trained and saved as the model in it; what is no model is refused."""

import pytest
import torch
from tiny_models import llama, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module, distribute_tensor

import headprune as hp
from headprune.surgery.export import export

KEEP = {"model.layers.0.self_attn": [0, 3, 5], "model.layers.1.self_attn": [1, 2, 7]}
BATCHES = [{"input_ids": rows, "labels": rows} for rows in tokens(60, 12).split(6)]


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=BATCHES[0]["input_ids"]).logits


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_heads_of_a_compiled_model_are_gated_and_cut_as_those_of_a_plain_one(compiled, tmp_path):
    model, plain = compiled(llama()), llama()
    before = logits(model)  # compiled here, without hooks
    with hp.gated(plain, KEEP), hp.gated(model, KEEP):
        torch.testing.assert_close(logits(model), logits(plain))
    torch.testing.assert_close(logits(model), before)
    for name, scores in hp.score(model, BATCHES, ["fisher", "output_norm"]).items():
        for site, expected in hp.score(plain, BATCHES, name).items():
            torch.testing.assert_close(scores[site], expected)
    hp.prune(model, hp.PruningPlan.from_keep(plain, KEEP), BATCHES)
    hp.prune(plain, hp.PruningPlan.from_keep(plain, KEEP), BATCHES)
    torch.testing.assert_close(logits(model), logits(plain))
    hp.save(model, tmp_path / "pruned")
    torch.testing.assert_close(logits(hp.load(tmp_path / "pruned")), logits(plain))


def test_a_wrapped_model_has_the_names_of_the_model_in_it():
    model = llama()
    assert [site.name for site in hp.attention_sites(wrapped(model))] == [site.name for site in hp.attention_sites(model)]
    assert hp.PruningPlan.from_keep(wrapped(model), KEEP) == hp.PruningPlan.from_keep(model, KEEP)


def test_a_compiled_student_is_distilled():
    dense, student = llama(), llama()
    hp.cut(student, KEEP)
    logits(in_place(student))
    plain = llama()
    hp.cut(plain, KEEP)
    for model in (student, plain):
        hp.recover(model, BATCHES, teacher=wrapped(dense), distil=hp.Distillation(logits=1.0, hidden=1.0), steps=2, lr=1e-3)
    torch.testing.assert_close(logits(student), logits(plain))


SWAPS = {"cut": lambda model: hp.cut(model, {"layers.0.self_attn": [0, 2]}), "replace": hp.nn.replace_multihead_attention}


@pytest.mark.parametrize("swap", SWAPS)
def test_torch_layers_swapped_in_inference_mode_can_be_trained(swap):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1, enable_nested_tensor=False).eval()
    with torch.inference_mode():
        SWAPS[swap](model)
    model(torch.randn(2, 5, 16)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("given", [None, "minilm", {"model": 1}])
def test_what_is_no_model_is_named(given):
    for act in (hp.attention_sites, lambda it: hp.score(it, BATCHES), lambda it: hp.cut(it, KEEP), lambda it: hp.save(it, "out")):
        with pytest.raises(hp.InvalidInput, match=r"model is .*; expected a torch\.nn\.Module"):
            act(given)


@pytest.fixture
def mesh(tmp_path):
    """Of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("mesh")
def test_a_model_in_distributed_data_parallel_is_scored_but_neither_cut_nor_saved(tmp_path):
    model = nn.parallel.DistributedDataParallel(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    assert list(hp.score(model, criterion="magnitude_l2")) == ["module.self_attn"]
    changes = (
        lambda: hp.cut(model, {"module.self_attn": [0]}),
        lambda: hp.save(model, tmp_path / "saved"),
        lambda: hp.nn.replace_multihead_attention(model),
    )
    for change in changes:
        with pytest.raises(hp.InvalidInput, match=r"wrapped in DistributedDataParallel; give model\.module"):
            change()


def test_a_sharded_model_is_refused_also_while_it_shows_whole_weights(mesh, tmp_path):
    """The outermost unit of FSDP2 keeps them so between its forward and its backward pass."""
    model = llama()
    fully_shard(model, mesh=mesh)
    logits(model)
    assert type(model.model.layers[0].self_attn.q_proj.weight) is nn.Parameter
    changes = (
        lambda: hp.cut(model, KEEP),
        lambda: hp.prune(model, hp.PruningPlan.from_keep(llama(), KEEP)),
        lambda: hp.save(model, tmp_path / "saved"),
        lambda: export(model, "stock", tmp_path / "stock"),
        lambda: hp.recover(model, BATCHES, steps=1),
    )
    for change in changes:
        with pytest.raises(
            hp.InvalidInput, match=r"model is a FSDPLlama\w+, of whose weights each rank holds a part; give the model as"
        ):
            change()


def test_a_layer_of_spread_weights_is_not_pruned(mesh):
    layer = hp.nn.VariableHeadAttention(16, 4)
    distribute_module(layer, mesh)
    with pytest.raises(hp.InvalidInput, match=r"q_proj\.weight is a DTensor, of which each rank has a part"):
        layer.prune([0])


@pytest.mark.parametrize("spread", ["query", "key", "gate"])
def test_an_operator_names_a_tensor_that_is_spread_over_ranks(mesh, spread):
    given = {name: torch.randn(1, 4, 6, 8) for name in ("query", "key", "value")} | {"gate": torch.ones(4)}
    with pytest.raises(hp.InvalidInput, match=rf"{spread} is a DTensor; expected a tensor of this rank: {spread}\.to_local\(\)"):
        hp.ops.attention(**given | {spread: distribute_tensor(given[spread], mesh)})
