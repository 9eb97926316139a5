"""A model in half precision is trained in fp32: a usual step is smaller than the distance between two of its numbers."""

import copy

import pytest
import torch
from pruned_pairs import pruned_llama, text_batches

import headprune as hp
from headprune.recovery.master_weights import master_weights


def half() -> torch.nn.Module:
    model = pruned_llama()[1].to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


@pytest.mark.parametrize("method", ["full", "projections"])
def test_what_stays_is_the_rounded_result_of_a_training_in_fp32(method, tmp_path):
    model = half()
    single = copy.deepcopy(model).float()
    options = {"method": method, "steps": 6, "lr": 3e-5, "warmup": 0}
    hp.recover(single, text_batches(), bf16=True, **options)
    result = hp.recover(model, text_batches(), output_dir=tmp_path / "recovery", save_steps=2, **options)
    assert result.steps == 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    rounded = single.to(torch.bfloat16).state_dict()
    # Frozen layers compute in the type that they hold: a gradient that is nearly 0 may get the other sign, and Adam steps as far.
    alike = [torch.isclose(found, rounded[name], rtol=2**-7, atol=1e-6).flatten() for name, found in model.state_dict().items()]
    assert float(torch.cat(alike).float().mean()) > 0.999
    hp.save(model, tmp_path / "saved")
    assert {parameter.dtype for parameter in hp.load(tmp_path / "saved").parameters()} == {torch.bfloat16}


def test_small_steps_add_up():
    model = half()
    before, pure = copy.deepcopy(model), copy.deepcopy(model)
    weights = [name for name, _ in model.named_parameters() if name.endswith("q_proj.weight")]
    hp.recover(model, text_batches(), steps=30, lr=3e-5, warmup=0)
    optimizer = torch.optim.AdamW(pure.parameters(), lr=3e-5, weight_decay=0.0)
    for batch in (text_batches() * 30)[:30]:
        pure(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def changed(one) -> float:
        found, was = one.state_dict(), before.state_dict()
        return sum(float((found[name] != was[name]).float().mean()) for name in weights) / len(weights)

    assert changed(model) > 2 * changed(pure)


def test_adapters_of_a_half_precision_model_are_trained_in_fp32():
    model = half()
    before = copy.deepcopy(model)
    result = hp.recover(model, text_batches(), method="lora", steps=12, lr=5e-3)
    assert result.losses[-1][1] < result.losses[0][1] - 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


def test_only_what_is_trained_becomes_fp32():
    model = half()
    model.model.embed_tokens.requires_grad_(False)
    with master_weights(model, True):
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
