"""The types that a user's own checks see: those of the installed package, which says py.typed."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from distribution import ROOT, built, installed, tree_copy

RIGHT = """
from typing import Any, assert_type

import headprune as hp
from headprune.scoring import SiteObservations
from torch import Tensor, nn
from transformers import PreTrainedModel


@hp.criterion("mine", needs={hp.Need.GATE_GRADIENT}, source="a test", cost="one backward pass")
def mine(observed: SiteObservations) -> Tensor:
    return observed.gate_gradient.square().mean(dim=0)


def shrunk(model: PreTrainedModel, batches: list[dict[str, Tensor]], dense: nn.Module) -> PreTrainedModel:
    scores = hp.score(model, batches, criterion="fisher")
    assert_type(scores, hp.HeadScores)
    assert_type(hp.score(model, batches, ["fisher", "magnitude_l2"]), dict[str, hp.HeadScores])
    assert_type(scores["layer"], Tensor)
    chosen = hp.plan(scores, hp.Budget(heads=0.5), min_heads=1, protect=["layer"])
    assert_type(chosen, hp.PruningPlan)
    assert_type(hp.search_plan(model, scores, hp.Budget(params=0.2), batches, trials=2).plan, hp.PruningPlan)
    with hp.gated(model, chosen) as same:
        assert_type(same, nn.Module)
    hp.prune(model, chosen, calibration=batches)
    assert_type(hp.recover(model, batches, teacher=dense, minutes=2), hp.Recovery)
    assert_type(hp.iterative(model, batches, hp.Budget(heads=0.5), steps=4, folder="it").plan, hp.PruningPlan)
    hp.save(model, "pruned")
    assert_type(hp.load("plain", model=dense), nn.Module)
    return hp.load("pruned")


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    ragged = hp.HeadMap((0, 0, 0, 1), 2)
    output, statistics = hp.ops.attention(query, key, value, ragged, causal=True, stats=True)
    assert_type(statistics.entropy, Tensor)
    assert_type(hp.ops.attention(query, key, value, window=4), Tensor)
    layer = hp.nn.VariableHeadAttention(512, 8, batch_first=True)
    layer.prune([0, 2])
    return output
"""
WRONG = """
import headprune as hp
from torch import nn


def wrong(model: nn.Module, scores: hp.HeadScores) -> None:
    hp.plan(scores, 0.5)  # wrong
    hp.plan(scores, hp.Budget(heads="half"))  # wrong
    hp.Budget(head=0.5)  # wrong
    hp.prune(model)  # wrong
    kept: list[int] = hp.plan(scores, hp.Budget(heads=0.5))  # wrong
    hp.score(model, criterion=3)  # wrong
    hp.iterative(model, [], hp.Budget(heads=0.5), steps="four")  # wrong
    hp.load(5)  # wrong
    hp.evaluated(model)  # wrong
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> dict[str, list[int]]:
    """File -> the lines that `mypy --strict` complains about, away from the tree."""
    tree, folder = tree_copy(tmp_path_factory.mktemp("work") / "tree"), tmp_path_factory.mktemp("user")
    site = installed(built(tree, tmp_path_factory.mktemp("dist")), tmp_path_factory.mktemp("site"))
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    # By the settings of `make lint`, so that what it has kept of torch and transformers holds here too: minutes less.
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", folder / ".mypy_cache")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml", "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"^(\w+\.py):(\d+): error", done.stdout, re.MULTILINE)
    assert len(found) == done.stdout.count(" error: "), done.stdout
    return {file: [int(line) for name, line in found if name == file] for file in ("right.py", "wrong.py")}


def test_a_program_that_uses_the_package_passes_strict_checks_and_gets_its_types(complaints):
    assert complaints["right.py"] == []


def test_every_wrong_use_is_found(complaints):
    marked = [number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")]
    assert complaints["wrong.py"] == marked
