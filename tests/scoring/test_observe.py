"""The one pass: it stops and goes on, says what it did not reach, and refuses data that do not belong together."""

import logging
import sys

import pytest
import torch
from tiny_models import llama, tokens
from torch import nn

import headprune as hp
from headprune import scoring
from headprune.errors import InvalidInput
from headprune.planning import Budget, plan
from headprune.scoring import HeadScores, Observations, observe

NEEDS = {"gate_gradient", "gram", "weights"}


def batches_for(count: int = 4) -> list[dict]:
    return [{"input_ids": tokens(3, 8, seed), "labels": tokens(3, 8, seed)} for seed in range(count)]


def killed_after(batches: list, count: int):
    yield from batches[:count]
    raise KeyboardInterrupt


def same(first: Observations, second: Observations) -> None:
    assert first.seen == second.seen
    for name, site in first.items():
        for field, value in vars(site).items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value, getattr(second[name], field), rtol=1e-12, atol=0), field
            else:
                assert value == getattr(second[name], field)


def test_a_killed_pass_goes_on_behind_the_batches_that_it_had_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["headprune.scoring.observe"], "CHECKPOINT_SECONDS", 0.0)
    file, model, batches = tmp_path / "observed.safetensors", llama(), batches_for()
    with pytest.raises(KeyboardInterrupt):
        observe(model, killed_after(batches, 3), NEEDS, checkpoint=file)
    assert len(Observations.load(file).seen) == 3
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = observe(model, batches, NEEDS, checkpoint=file)
    assert len(forwards) == 1
    same(found, observe(model, batches, NEEDS))
    same(Observations.load(file), found)
    forwards.clear()
    same(observe(model, batches, NEEDS, checkpoint=file), found)
    assert not forwards


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batches": batches_for(5)[1:]}, "batch 0 is not the one"),
        ({"model": llama(layers=1)}, "another model"),
        ({"needs": {"gram"}}, "other needs"),
        ({"batches": batches_for(3)}, "holds 4 batches and 3 were given"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, says):
    file, arguments = tmp_path / "observed.safetensors", {"model": llama(), "batches": batches_for(), "needs": NEEDS}
    observe(**arguments, checkpoint=file)
    with pytest.raises(InvalidInput, match=says):
        observe(**{**arguments, **change}, checkpoint=file)


def test_batches_with_other_keys_are_refused_by_number():
    batches = batches_for(2)
    del batches[1]["labels"]
    with pytest.raises(InvalidInput, match=r"batch 1 has the keys \['input_ids'\]"):
        observe(llama(), batches, {"gram"})


class TwoTowers(nn.Module):
    """Text that is always read, and a second model that the data may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.other = llama(layers=1), llama(layers=1, seed=1)

    def forward(self, input_ids, other_ids=None):
        found = self.text(input_ids=input_ids).logits.square().mean(dim=(1, 2))
        return found if other_ids is None else found + self.other(input_ids=other_ids).logits.square().mean(dim=(1, 2))


def towers_loss(model, batch):
    return model(**batch)


UNREACHED = "other.model.layers.0.self_attn"


@pytest.mark.parametrize("criterion", ["fisher", "wanda"])
def test_attentions_that_no_data_reach_are_an_error_or_stay_whole_but_are_never_scored_zero(criterion, caplog, tmp_path):
    model, batches = TwoTowers(), [{"input_ids": tokens(3, 8)}]
    with pytest.raises(InvalidInput, match=f"{UNREACHED} not reached"):
        scoring.score(model, batches, criterion, loss_fn=towers_loss)
    with caplog.at_level(logging.WARNING, "headprune"):
        scores = scoring.score(model, batches, criterion, loss_fn=towers_loss, unreached="keep")
    assert UNREACHED in caplog.text
    assert scores.unreached == {UNREACHED}
    assert torch.isnan(scores[UNREACHED]).all()
    assert "not reached" in str(scores.__rich__().columns[1]._cells)
    scores.save(tmp_path / "scores.json")
    again = HeadScores.load(tmp_path / "scores.json")
    assert again.unreached == scores.unreached
    assert (again.spread is None) == (scores.spread is None)
    chosen = plan(again, Budget(heads=0.25))
    assert len(chosen[UNREACHED]) == 8
    assert chosen.removed_heads == 4
    chosen.save(tmp_path / "plan.json")
    assert type(chosen).load(tmp_path / "plan.json").scores.unreached == scores.unreached
    for name in ("scores.json", "plan.json"):  # JSON knows no NaN: what is not there is null
        assert "NaN" not in (tmp_path / name).read_text()


def test_a_batch_that_leaves_a_site_out_counts_as_samples_without_gradient():
    model, both = TwoTowers(), {"input_ids": tokens(3, 8), "other_ids": tokens(3, 8, 5)}
    text = [{"input_ids": tokens(2, 8), "other_ids": None}]
    found = observe(model, [both, *text], {"gate_gradient"}, loss_fn=towers_loss)[UNREACHED]
    assert found.gate_gradient.shape == (5, 8)
    assert (found.gate_gradient[:3] != 0).all()
    assert (found.gate_gradient[3:] == 0).all()
    parts = observe(model, [both], {"gate_gradient"}, loss_fn=towers_loss) + observe(
        model, text, {"gate_gradient"}, loss_fn=towers_loss, unreached="keep"
    )
    assert torch.equal(parts[UNREACHED].gate_gradient, found.gate_gradient)


def test_the_value_of_unreached_is_checked():
    with pytest.raises(InvalidInput, match="unknown value of unreached"):
        observe(llama(), batches_for(1), {"gram"}, unreached="ignore")


def test_a_pass_over_a_model_with_an_attention_without_heads_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["headprune.scoring.observe"], "CHECKPOINT_SECONDS", 0.0)
    file, model, batches = tmp_path / "observed.safetensors", llama(), batches_for()
    hp.cut(model, {"model.layers.0.self_attn": []})
    with pytest.raises(KeyboardInterrupt):
        observe(model, killed_after(batches, 3), NEEDS, checkpoint=file)
    found = observe(model, batches, NEEDS, checkpoint=file)
    same(found, observe(model, batches, NEEDS))
    same(observe(model, batches, NEEDS, checkpoint=file), found)
    assert list(found) == [site.name for site in hp.attention_sites(model)]


def test_an_attention_without_heads_is_passed_over():
    model = llama()
    hp.cut(model, {"model.layers.0.self_attn": []})
    batches = [{"input_ids": tokens(3, 8, seed), "labels": tokens(3, 8, seed)} for seed in range(2)]
    criteria = ["fisher", "magnitude_l2", "wanda", "entropy", "least_squares"]
    for scores in hp.score(model, batches, criterion=criteria).values():
        assert (scores["model.layers.0.self_attn"].numel(), scores["model.layers.1.self_attn"].isfinite().all()) == (0, True)
        chosen = hp.plan(scores, hp.Budget(heads=0.5))
        assert (chosen["model.layers.0.self_attn"], len(chosen["model.layers.1.self_attn"])) == ((), 4)
        assert list(scores) == list(chosen) == [site.name for site in hp.attention_sites(model)]  # engines ask for the first layer
    hp.prune(model, chosen)
    assert str(hp.attention_sites(model)[1].head_map).startswith("4q")


@pytest.mark.parametrize(("found", "shown"), [(None, "NoneType"), (1.5, "float"), (torch.zeros(2, 2), r"\[2, 2\]")])
def test_a_loss_function_that_gives_no_losses_is_told(found, shown):
    with pytest.raises(InvalidInput, match=f"loss_fn gave {shown}; expected per-sample losses"):
        observe(llama(), batches_for(1), {"gate_gradient"}, loss_fn=lambda model, batch: found)
