"""Every script in examples/ runs on the small model that it makes itself, and what it prints is what it promises."""

import json
import re
from pathlib import Path

import pytest
from child_process import forked
from PIL import Image
from transformers import ViTImageProcessorPil

import headprune as hp

EXAMPLES = Path(__file__).parents[1] / "examples"
PRELOAD = ["headprune", "headprune.recovery.training", "transformers.models.bert", "transformers.models.llama"]


@pytest.fixture
def run(tmp_path):
    return lambda name, *arguments, **options: forked(
        EXAMPLES / f"{name}.py", *arguments, folder=tmp_path, preload=PRELOAD, **options
    )


def numbers(printed: str, line: str) -> list[float]:
    """All numbers of the one line that starts with `line`."""
    (found,) = (one for one in printed.splitlines() if one.startswith(line))
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", found.removeprefix(line))]


def cells(printed: str, row: str) -> list[str]:
    """What stands in the row of a table behind its first cell `row`."""
    (found,) = (one for one in printed.splitlines() if one.startswith(f"│ {row} "))
    return [cell.strip() for cell in found.strip("│").split("│")[1:]]


def heads_left(folder: Path) -> int:
    return sum(site.head_map.query_heads for site in hp.attention_sites(hp.load(folder)))


def test_a_bert_classifier_loses_half_of_its_heads_and_little_accuracy(run, tmp_path):
    printed = run("prune_bert_classifier")
    assert numbers(printed, "cut = gated to within")[0] < 1e-5
    dense, cut, compensated = numbers(printed, "accuracy:")
    assert dense > 0.85
    assert compensated > max(0.7, cut - 0.03)
    assert heads_left(tmp_path / "pruned-bert") == 8
    (tmp_path / "texts.txt").write_text("the tea was not bad and the view was fair\nthe soup was stale\n" * 40)
    yours = ("--model", "pruned-bert", "--text", "texts.txt", "--heads", "0.25", "--output", "yours")
    dense, _, compensated = numbers(run("prune_bert_classifier", *yours), "accuracy:")
    assert dense == 1.0 >= compensated
    assert heads_left(tmp_path / "yours") == 6


def test_a_llama_with_ragged_groups_is_served(run, tmp_path):
    printed = run("prune_and_serve_llama", "--prompt", "0 stars : the tea was")
    dense, pruned = numbers(printed, "perplexity:")
    assert dense < pruned < 1.1 * dense < 4
    groups = [numbers(printed, f"model.layers.{layer}.self_attn: query heads of each key/value head:") for layer in (0, 1)]
    assert sum(sum(sizes) for sizes in groups) == heads_left(tmp_path / "pruned-llama") == 8
    assert any(len(set(sizes)) > 1 for sizes in groups)
    assert re.search(r"^answer: 0 stars : the tea was( \S+){18}$", printed, re.MULTILINE)
    (tmp_path / "text.txt").write_text("3 stars : the bed was good and the tea was not bad and the room was fair . " * 80)
    yours = ("--model", "pruned-llama", "--text", "text.txt", "--heads", "0.25", "--output", "yours")
    dense, pruned = numbers(run("prune_and_serve_llama", *yours), "perplexity:")
    assert dense > 1
    assert heads_left(tmp_path / "yours") == 6


def test_a_vit_keeps_to_a_budget_of_flops(run, tmp_path):
    printed = run("prune_vit")
    accuracies = re.findall(r"^accuracy: dense (\S+), (.+) (\S+)$", printed, re.MULTILINE)
    assert [name for _, name, _ in accuracies] == ["by scores alone", "of 5 plans tried"]
    assert all(float(dense) > 0.9 and float(pruned) > 0.6 for dense, _, pruned in accuracies)
    assert numbers(printed, "attention FLOPs:")[0] <= 0.25
    assert heads_left(tmp_path / "pruned-vit") == 4
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "pruned-vit")
    (tmp_path / "pictures").mkdir()
    for number in range(16):
        Image.effect_noise((30, 20), 10.0 * number).save(tmp_path / "pictures" / f"{number}.png")
    yours = ("--model", "pruned-vit", "--pictures", "pictures", "--flops", "0.25", "--output", "yours")
    assert numbers(run("prune_vit", *yours), "attention FLOPs:")[0] <= 0.75
    assert heads_left(tmp_path / "yours") == 3


def test_attention_of_plain_pytorch_is_replaced_and_pruned(run):
    printed = run("replace_torch_attention")
    assert numbers(printed, "replaced: outputs differ by")[0] < 1e-3
    dense, cut, compensated = numbers(printed, "accuracy:")
    assert dense > 0.8
    assert compensated > cut
    assert numbers(printed, "loaded again:")[0] == compensated
    assert "by itself: 3q/2kv ragged 2+1, output [2, 5, 48]" in printed


def test_criteria_of_ones_own_are_compared_with_those_that_come_along(run):
    printed = run("write_a_criterion")
    dense = float(cells(printed, "(all heads)")[1])
    for name in ("worst_tenth", "mean_rank", "fisher", "random"):
        overlap, perplexity = cells(printed, name)
        assert 0 <= int(overlap.rstrip("%")) <= 100
        assert float(perplexity) > dense
    assert float(cells(printed, "worst_tenth")[1]) < float(cells(printed, "random")[1])


def test_an_attention_is_unknown_before_its_adapter_and_pruned_after(run):
    printed = run("write_an_adapter")
    assert "before: Sequential: no adapter knows 1 (ForgetfulAttention), 3 (ForgetfulAttention)" in printed
    assert "after: 1 with 8 heads, 3 with 8 heads" in printed
    assert numbers(printed, "cut = gated to within")[0] < 1e-5
    dense, cut, compensated = numbers(printed, "loss:")
    assert dense < compensated < cut
    assert "loaded again into a fresh network: the same outputs" in printed


def test_pruning_aware_training_ends_at_its_budget(run, tmp_path):
    printed = run("pruning_aware_training", "--folder", "aware")
    rows = {
        name: cells(printed, name) for name in ("dense", "one-shot", "one-shot, then 150 steps", "pruning-aware, hard_concrete")
    }
    assert [int(heads) for _, heads in rows.values()] == [16, 4, 4, 4]
    assert float(rows["pruning-aware, hard_concrete"][0]) > float(rows["one-shot"][0]) - 0.05
    assert heads_left(tmp_path / "aware" / "model") == 4
    gates = [float(gate) for line in re.findall(r": gates ([\d. ]+);", printed) for gate in line.split()]
    assert len(gates) == 16
    assert all(0 <= gate <= 1.05 for gate in gates)


def test_two_ranks_recover_a_model_by_ddp_and_by_fsdp2(run, tmp_path):
    printed = run("distributed_recovery", ranks=2)
    dense, pruned, ddp, fsdp2 = (numbers(printed, f"perplexity {name}:")[0] for name in ("dense", "pruned", "DDP", "FSDP2"))
    assert pruned - ddp > 0.5 * (pruned - dense) > 0
    assert pruned - fsdp2 > 0.5 * (pruned - dense)
    held, parameters = re.search(r"rank 0 held (\S+) of (\S+) parameters", printed).groups()
    assert int(held.replace(",", "")) < 0.55 * int(parameters.replace(",", ""))
    assert heads_left(tmp_path / "recovered-llama") == 4


def test_a_plan_is_edited_by_hand_and_a_wrong_one_is_refused(run, tmp_path):
    printed = run("edit_a_plan")
    after, before = re.search(r"keeps (\[.*?\]) in place of (\[.*?\])", printed).groups()
    name = printed.split(": keeps ")[0].splitlines()[-1]
    assert list(hp.PruningPlan.load(tmp_path / "plan.json")[name]) == json.loads(after) != json.loads(before)
    assert len(json.loads(after)) == len(json.loads(before))
    assert printed.count("refused: ") == 2
    assert "query head 99 does not exist" in printed
    assert "dry run, nothing was changed" in printed
    edited, compensated = (numbers(printed, f"perplexity {title}:")[0] for title in ("as edited", "pruned and re-solved"))
    assert compensated < edited


def test_every_example_is_listed_says_how_to_run_it_and_is_short():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in listed
        source = path.read_text(encoding="utf-8")
        if path.stem != "quick_models":
            assert f"examples/{path.name}" in source.split('"""')[1]
            assert len(source.splitlines()) <= 110
