"""A plan knows its model by more than the shapes of its attentions."""

import copy
import json
import logging

import pytest
import torch
from tiny_decoders import decoder
from tiny_models import bert, llama, tokens

import headprune as hp
from headprune.errors import InvalidInput, InvalidPlan
from headprune.models.identity import ModelIdentity
from headprune.surgery.checkpoint import skeleton

KEEP = {"model.layers.0.self_attn": [0, 1, 2]}


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "headprune"]


@pytest.fixture
def plan() -> hp.PruningPlan:
    return hp.PruningPlan.from_keep(llama(), KEEP)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (
            lambda: decoder("mistral", num_attention_heads=8, num_key_value_heads=4, head_dim=8),
            "its model_type is llama, .* is mistral",
        ),
        (
            lambda: decoder(
                "llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, attention_bias=False, intermediate_size=80
            ),
            "its intermediate_size is 48, the given model's is 80",
        ),
    ],
)
def test_another_model_whose_attentions_have_the_same_shapes_is_refused(plan, other, names):
    model = other()
    assert hp.PruningPlan.from_keep(model, KEEP).shapes == plan.shapes
    with pytest.raises(InvalidPlan, match=names):
        hp.prune(model, plan)
    assert model.model.layers[0].self_attn.q_proj.out_features == 64


def resized(model, tokens):
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def test_other_weights_are_taken_with_a_warning(plan, caplog):
    with caplog.at_level(logging.WARNING, "headprune"):
        hp.prune(llama(seed=5), plan)
    (line,) = warnings_of(caplog)
    assert "made for other weights of this architecture" in line


def test_the_same_model_in_another_dtype_trained_further_or_with_new_tokens_is_taken_in_silence(plan, caplog, tmp_path):
    trained = llama()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    trained(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    hp.save(llama(), tmp_path / "model")
    with caplog.at_level(logging.WARNING, "headprune"):
        for model in (llama().to(torch.bfloat16), trained, resized(llama(), 64), skeleton(tmp_path / "model")):
            plan.check_fits(model)
    assert not warnings_of(caplog)


def test_scores_hand_it_on_to_plans_and_files_of_both_keep_it(tmp_path):
    model = bert()
    scores = hp.score(model, [{"input_ids": tokens()}], "random")
    scores.save(tmp_path / "scores.json")
    made = hp.plan(hp.HeadScores.load(tmp_path / "scores.json"), hp.Budget(heads=0.5))
    made.save(tmp_path / "plan.json")
    loaded = hp.PruningPlan.load(tmp_path / "plan.json")
    assert loaded.made_for == loaded.scores.made_for == scores.made_for == ModelIdentity.of(model)
    assert loaded.made_for.architecture["hidden_size"] == model.config.hidden_size
    assert 0 < len(loaded.made_for.weights) <= 64


def test_files_of_earlier_versions_say_nothing_and_are_read(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    del document["model"]
    path.write_text(json.dumps(document))
    earlier = hp.PruningPlan.load(path)
    assert earlier.made_for is None
    hp.prune(llama(seed=5), earlier)
    path.write_text(json.dumps({**document, "model": "llama"}))
    with pytest.raises(InvalidInput, match="not a complete pruning_plan"):
        hp.PruningPlan.load(path)


def test_plain_modules_are_known_by_their_weights_alone(caplog):
    layers = [torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2)]
    plan = hp.PruningPlan.from_keep(layers[0], {"self_attn": [0, 2]})
    assert plan.made_for.architecture == {}
    with caplog.at_level(logging.WARNING, "headprune"):
        plan.check_fits(copy.deepcopy(layers[0]))
        assert not warnings_of(caplog)
        plan.check_fits(layers[1])
    assert len(warnings_of(caplog)) == 1
