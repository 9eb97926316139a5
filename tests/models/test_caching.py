"""What a model caches, and that a budget of it counts nothing else."""

import pytest
from tiny_encoders import ENCODERS, SEQ2SEQ
from tiny_vision_language import VISION_LANGUAGE

import headprune as hp
from headprune.evaluation.cost import cached_bytes_per_token, kv_cache_bytes_per_token

MODELS = {**SEQ2SEQ, **VISION_LANGUAGE}


@pytest.mark.parametrize("family", ["bart", "t5", "qwen2_vl"])
def test_a_budget_of_the_cache_takes_no_head_that_caches_nothing(family):
    """It took those of encoders and towers too, and the cache shrank by less than was asked for."""
    model = MODELS[family].make()
    sites = hp.attention_sites(model)
    before = cached_bytes_per_token(model, sites, 4)
    assert before == kv_cache_bytes_per_token(sites)
    chosen = hp.plan(hp.score(model, (), "random"), hp.Budget(kv_cache=0.5), granularity="kv_group")
    hp.cut(model, chosen)
    assert cached_bytes_per_token(model, hp.attention_sites(model), 4) == before // 2
    silent = [site for site in sites if "encoder.layers" in site.name or site.name.startswith("encoder") or "visual" in site.name]
    assert silent
    assert all(len(chosen[site.name]) == site.head_map.query_heads for site in silent)


def test_an_encoder_alone_has_a_budget_of_keys_and_values_all_the_same():
    model = ENCODERS["bert"].make()
    assert hp.plan(hp.score(model, (), "random"), hp.Budget(kv_cache=0.5), granularity="kv_group").removed_heads == 4


def test_a_plan_of_an_older_version_whose_encoder_was_said_to_cache_fits(tmp_path):
    model = SEQ2SEQ["bart"].make()
    plan = hp.plan(hp.score(model, (), "random"), hp.Budget(heads=0.5))
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '"kv_head": 0' in text
    (tmp_path / "plan.json").write_text(text.replace('"kv_head": 0', '"kv_head": 16'))
    hp.PruningPlan.load(tmp_path / "plan.json").check_fits(model)
