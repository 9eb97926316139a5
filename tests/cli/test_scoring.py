"""Commands that measure heads."""

import json

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from tiny_models import bert, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from headprune.cli import scoring
from headprune.errors import InvalidPlan
from headprune.planning import Budget, Sensitivity, plan
from headprune.scoring import HeadScores, score
from headprune.scoring import criteria as scoring_criteria


def test_criteria_lists_names_and_sources(call):
    code, out, _ = call("criteria")
    assert code == 0
    assert "fisher" in out
    assert "Kwon" in out
    names = {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")}
    assert set(scoring_criteria()) <= names  # whole, also on a narrow terminal


class TinyTask:
    """What `headprune score` asks of a task."""

    tokenizer = None
    token_kinds = staticmethod(lambda: None)

    def __init__(self, samples: int = 4):
        self.calibration = [{"input_ids": tokens(samples, 9, seed)} for seed in range(2)]

    def loss(self, model, batch):
        return model(**batch).last_hidden_state.square().mean(dim=(1, 2))


@pytest.fixture
def tiny_task(monkeypatch):
    monkeypatch.setattr(scoring, "opened", lambda *_, **__: (bert(), TinyTask()))


def test_score_shows_heat_maps_agreement_stability_and_portraits(call, tiny_task):
    code, out, err = call("score", "tiny", "--criterion", "fisher, entropy,least_squares", "--portraits")
    assert code == 0, err
    for shown in ("fisher: percentile of each head", "agreement of criteria", "fisher, entropy", "stability", "portraits"):
        assert shown in out
    assert "too few calibration samples to rank" in err
    for name in ("fisher", "entropy", "least_squares"):
        found = HeadScores.load(f"scores-{name}.json")
        expected = score(bert(), TinyTask().calibration, name, loss_fn=TinyTask().loss)
        assert all(torch.allclose(found[site], expected[site], rtol=1e-3, atol=1e-8) for site in expected)


def test_score_prints_one_json_document(call, tiny_task):
    code, out, err = call("score", "tiny", "--json", "--portraits", "--normalize", "layer_l2")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["scores"]) == ["fisher"]
    assert found["agreement"] == []
    assert 0 <= found["stability"]["fisher"]["overlap"] <= 1
    assert len(found["portraits"]["encoder.layer.0.attention"]) == 4
    assert HeadScores.load("scores.json").to_json() == found["scores"]["fisher"]


def test_scores_of_the_command_line_name_their_model_so_that_plans_of_them_are_refused_elsewhere(call, tiny_task):
    code, _, err = call("score", "tiny", "--criterion", "magnitude_l2")
    assert code == 0, err
    chosen = plan(HeadScores.load("scores.json"), Budget(heads=0.5))
    chosen.check_fits(bert())
    other = bert()
    other.config.model_type = "roberta"
    with pytest.raises(InvalidPlan, match="its model_type is bert, the given model's is roberta"):
        chosen.check_fits(other)


def test_sensitivity_is_measured_on_the_first_batches_where_that_is_asked(call, tiny_task):
    assert call("score", "tiny", "--criterion", "magnitude_l2")[0] == 0
    samples = []
    for some in ((), ("--batches", "1")):
        code, _, err = call("sensitivity", "tiny", "scores.json", *some)
        assert code == 0, err
        samples.append(Sensitivity.load("sensitivity.json").samples)
    assert 0 < samples[1] < samples[0]


def test_a_model_in_four_bits_ranks_the_heads_of_the_model_itself(call, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=61,
        initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    letter_tokenizer().save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("some words of a text " * 80)
    task = ("--task", "text,calibration=text.txt,window=16", "--criterion", "output_energy")
    for bits, name in (((), "16.json"), (("--bits", "4"), "4.json")):
        code, _, err = call("score", "./llama", *task, *bits, "-o", name)
        assert code == 0, err
    found, expected = HeadScores.load("4.json"), HeadScores.load("16.json")
    assert not all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.compare(expected).spearman > 0.8
    code, _, err = call("plan", "4.json", "--heads", "0.5", "-o", "plan.json")
    assert code == 0, err
    code, _, err = call("prune", "./llama", "plan.json", "-o", "pruned")
    assert code == 0, err
    for bits, message in (("3", "bits=3; expected 4 or 8"), ("4", "--streamed and --bits 4 were given")):
        more = ("--streamed",) if bits == "4" else ()
        code, _, err = call("score", "./llama", *task, "--bits", bits, *more)
        assert code == 2
        assert message in err
