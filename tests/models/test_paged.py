"""Continuous batching in transformers (`generate_batch`) of pruned models gives what generating each prompt by itself gives."""

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prompts_together import alone, together
from tiny_decoders import FAMILIES, decoder
from transformers.generation.continuous_batching import PagedAttentionCache

import headprune as hp
from headprune.models import paged

PLANS = {
    "groups in one layer": ([2, 3], [0, 1, 2, 3]),
    "one head each": ([0], [3]),
    "ragged": ([0, 1, 3], [1, 2, 3]),
    "no first layer": ([], [0, 2, 3]),
}
takes_any_heads = pytest.mark.skipif(
    set(inspect.signature(PagedAttentionCache.update).parameters) != paged.UPDATE, reason="this transformers has another cache"
)
WITHOUT_HEADPRUNE = """
import sys
sys.modules["headprune"] = None  # any import of it now fails
import torch, transformers
from prompts_together import alone, together
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert together(model) == alone(model), together(model)
"""


def pruned(family: str, plan: str):
    model = decoder(family)
    hp.cut(model, {site.name: heads for site, heads in zip(hp.attention_sites(model), PLANS[plan])})
    return model


@takes_any_heads
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", [family for family in ("llama", "gpt2", "phi3", "mistral", "gpt_oss") if family in FAMILIES])
def test_prompts_together_give_what_they_give_alone(family, plan):
    model = pruned(family, plan)
    for implementation in ("eager", model.config._attn_implementation):
        found = copy.deepcopy(model)
        found.set_attn_implementation(implementation)
        assert together(found) == alone(found), implementation
        assert found.config._attn_implementation == implementation


@takes_any_heads
@pytest.mark.parametrize("plan", ["groups in one layer", "ragged"])
def test_loaded_models_too_also_where_headprune_is_not(plan, tmp_path):
    model = pruned("llama", plan)
    hp.save(model, tmp_path / "pruned")
    assert together(hp.load(tmp_path / "pruned")) == alone(model)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", WITHOUT_HEADPRUNE, str(tmp_path / "pruned")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]


@takes_any_heads
def test_a_manager_that_lives_on_is_used_again():
    model = pruned("llama", "no first layer")
    expected = alone(model)
    assert [together(model, persistent_manager=True) for _ in range(2)] == [expected, expected]
    model.destroy_cached_continuous_batching_manager()


def test_where_the_cache_is_not_known_layers_that_differ_from_it_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(paged, "UPDATE", {"another"})
    model = pruned("llama", "groups in one layer")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn has 1 key/value heads; .* takes 2 in every layer"):
        together(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="in ragged groups"):
        together(pruned("llama", "ragged"))
    queries = decoder("llama")
    hp.cut(queries, {site.name: [0, 2] for site in hp.attention_sites(queries)})
    assert together(queries) == alone(queries)


def test_flash_attention_of_ragged_groups_is_refused_at_once():
    model = pruned("llama", "ragged")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="auto_switch_to_flash=False"):
        paged.refuse_flash(model)
    even = pruned("llama", "one head each")
    even.config._attn_implementation_internal = "flash_attention_2"
    paged.refuse_flash(even)
