"""With adapters the teacher needs no second copy of what was not cut, and has its own again afterwards."""

import copy

import torch
from pruned_pairs import pruned_llama, text_batches

import headprune as hp
from headprune.recovery.shared_weights import shared_weights


def test_frozen_weights_that_are_alike_are_one_copy():
    dense, pruned = pruned_llama()
    before = copy.deepcopy(dense.state_dict())
    pruned.requires_grad_(False)
    pruned.model.norm.weight.requires_grad_(True)
    pruned.model.layers[1].mlp.up_proj.weight.data.add_(1.0)
    with shared_weights(pruned, dense) as saved:
        shared = {name for name, own in dense.named_parameters() if own.data_ptr() == pruned.get_parameter(name).data_ptr()}
        assert saved == sum(4 * dense.get_parameter(name).numel() for name in shared)
        assert "model.embed_tokens.weight" in shared
        assert not {"model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"} & shared
    for name, own in dense.named_parameters():
        assert own.data_ptr() != pruned.get_parameter(name).data_ptr()
        assert torch.equal(own, before[name])


def test_merging_adapters_leaves_the_teacher_alone():
    dense, pruned = pruned_llama()
    before = copy.deepcopy(dense.state_dict())
    seen = []
    progress = lambda done, _: seen.append(dense.model.layers[0].mlp.up_proj.weight.data_ptr())  # noqa: E731
    place = pruned.model.layers[0].mlp.up_proj.weight.data_ptr()
    hp.recover(pruned, text_batches(), teacher=dense, method="lora", steps=3, lr=1e-2, progress=progress)
    assert set(seen) == {place}
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not torch.equal(pruned.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
