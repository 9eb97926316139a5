"""Every script in examples/ runs on the small model that it makes itself, and what it prints is what it promises."""

import re
from pathlib import Path

import pytest
from child_process import forked

import headprune as hp

EXAMPLES = Path(__file__).parents[1] / "examples"
PRELOAD = ["headprune", "headprune.recovery.training", "transformers.models.bert", "transformers.models.llama"]


@pytest.fixture
def run(tmp_path):
    return lambda name, *arguments: forked(EXAMPLES / f"{name}.py", *arguments, folder=tmp_path, preload=PRELOAD)


def numbers(printed: str, line: str) -> list[float]:
    """All numbers of the one line that starts with `line`."""
    (found,) = (one for one in printed.splitlines() if one.startswith(line))
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", found.removeprefix(line))]


def heads_left(folder: Path) -> int:
    return sum(site.head_map.query_heads for site in hp.attention_sites(hp.load(folder)))


def test_a_bert_classifier_loses_half_of_its_heads_and_little_accuracy(run, tmp_path):
    printed = run("prune_bert_classifier")
    assert numbers(printed, "cut = gated to within")[0] < 1e-5
    dense, cut, compensated = numbers(printed, "accuracy:")
    assert dense > 0.85
    assert compensated > max(0.7, cut - 0.03)
    assert heads_left(tmp_path / "pruned-bert") == 8


def test_a_llama_with_ragged_groups_is_served(run, tmp_path):
    printed = run("prune_and_serve_llama", "--prompt", "0 stars : the tea was")
    dense, pruned = numbers(printed, "perplexity:")
    assert dense < pruned < 1.1 * dense < 4
    groups = [numbers(printed, f"model.layers.{layer}.self_attn: query heads of each key/value head:") for layer in (0, 1)]
    assert sum(sum(sizes) for sizes in groups) == heads_left(tmp_path / "pruned-llama") == 8
    assert any(len(set(sizes)) > 1 for sizes in groups)
    assert re.search(r"^answer: 0 stars : the tea was( \S+){18}$", printed, re.MULTILINE)


def test_a_vit_keeps_to_a_budget_of_flops(run, tmp_path):
    printed = run("prune_vit")
    accuracies = re.findall(r"^accuracy: dense (\S+), (.+) (\S+)$", printed, re.MULTILINE)
    assert [name for _, name, _ in accuracies] == ["by scores alone", "of 8 plans tried"]
    assert all(float(dense) > 0.9 and float(pruned) > 0.6 for dense, _, pruned in accuracies)
    assert numbers(printed, "attention FLOPs:")[0] <= 0.25
    assert heads_left(tmp_path / "pruned-vit") == 4
