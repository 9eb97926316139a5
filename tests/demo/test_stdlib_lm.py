"""The decoder of the demo: trained once, kept, taken up after a kill, and pruned like any model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_library import use_tiny_library

from headprune import sources
from headprune.cli.runs import carry_out
from headprune.demo import cached_folder, stdlib_lm, stdlib_lm_path, training
from headprune.demo.stdlib_lm import Decoder, byte_level_bpe, initial_model
from headprune.demo.training import Training
from headprune.errors import HeadpruneError
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.standard_library import standard_library_text
from headprune.recipe import load_recipe, parse_recipe
from headprune.report.progress import Stages
from headprune.run import run
from headprune.surgery import load

TINY = Decoder(
    vocabulary=300,
    hidden=32,
    feed_forward=48,
    layers=2,
    head_dim=8,
    training=Training(steps=24, batch=8, window=32, learning_rate=6e-3, warm_up=4),
)
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path):
    use_tiny_library(monkeypatch, tmp_path / "library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_lowers_the_perplexity_of_text_it_never_saw():
    folder = stdlib_lm_path(decoder=TINY)
    trained, tokenizer = sources.open_model(str(folder))
    task = build_task("standard-library-text", tokenizer, window=32, test_windows=20)
    before = task.evaluate(initial_model(TINY, tokenizer))["perplexity"]
    assert task.evaluate(trained)["perplexity"] < before / 4


def test_the_second_call_does_not_train(monkeypatch):
    seen = []
    folder = stdlib_lm_path(lambda done, total: seen.append((done, total)), TINY)
    assert seen == [(step, 24) for step in range(1, 25)]
    assert names(folder.parent) == [folder.name]
    monkeypatch.setattr(stdlib_lm, "train", lambda *_: pytest.fail("trained twice"))
    assert stdlib_lm_path(decoder=TINY) == folder


@pytest.mark.parametrize("killed_at", [1, 9])
def test_a_killed_training_leaves_no_folder_and_goes_on_to_the_same_end(monkeypatch, tmp_path, killed_at):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    expected = load(stdlib_lm_path(decoder=TINY)).state_dict()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))

    def kill(done, total):
        if done == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stdlib_lm_path(kill, TINY)
    folder = cached_folder(TINY)
    assert names(folder.parent) == [f"{folder.name}.training"]
    steps = []
    found = load(stdlib_lm_path(lambda done, total: steps.append(done), TINY)).state_dict()
    assert steps[0] == killed_at + 1
    assert names(folder.parent) == [folder.name]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_unreadable_state_starts_the_training_anew():
    folder = cached_folder(TINY)
    folder.parent.mkdir(parents=True)
    folder.with_name(f"{folder.name}.training").write_bytes(b"no state")
    steps = []
    stdlib_lm_path(lambda done, total: steps.append(done), TINY)
    assert steps[0] == 1


def test_a_cache_that_cannot_be_written_is_said_before_the_training(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(HeadpruneError, match="cannot write"):
        stdlib_lm_path(lambda *_: pytest.fail("trained in vain"), TINY)


def test_other_settings_and_another_library_have_their_own_folder(tmp_path):
    found = {cached_folder(TINY), cached_folder(), cached_folder(dataclasses.replace(TINY, training=Training(seed=1)))}
    (tmp_path / "library" / "package3" / "part.py").write_text("")
    assert len(found | {cached_folder(TINY)}) == 4


def test_the_tokenizer_gives_back_any_text():
    tokenizer = byte_level_bpe(standard_library_text().training, 300)
    assert len(tokenizer) == 300
    for text in ("def f(x):\n\treturn  x\n", " naïve 漢字 \x00"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", sorted(sources.EMBEDDED))
def test_a_demo_is_the_recipe_of_its_name(name):
    assert load_recipe(RECIPES / f"{name}.yaml") == parse_recipe(sources.demo_recipe(name), "of the demo")


def test_the_first_demo_trains_before_its_folder_exists_and_logs_once_it_does(monkeypatch, tmp_path):
    embedded = dataclasses.replace(sources.EMBEDDED["stdlib-lm"], folder=lambda progress: stdlib_lm_path(progress, TINY))
    monkeypatch.setitem(sources.EMBEDDED, "stdlib-lm", embedded)
    content = sources.demo_recipe("stdlib-lm")
    content["task"]["options"] = {"window": 32, "batch": 4, "calibration_windows": 24, "test_windows": 12}
    content |= {"output": str(tmp_path / "run"), "evaluate": {"repeats": 1}}
    carry_out(parse_recipe(content, "test"), json=False)
    assert "output error" in (tmp_path / "run" / "log.txt").read_text()


def test_the_demo_prunes_heads_one_by_one_and_generates_as_gated(monkeypatch, tmp_path):
    embedded = dataclasses.replace(sources.EMBEDDED["stdlib-lm"], folder=lambda progress: stdlib_lm_path(progress, TINY))
    monkeypatch.setitem(sources.EMBEDDED, "stdlib-lm", embedded)
    content = sources.demo_recipe("stdlib-lm")
    content["task"]["options"] = {"window": 32, "batch": 4, "calibration_windows": 24, "test_windows": 12}
    content |= {"output": str(tmp_path / "run"), "evaluate": {"repeats": 2}}
    result = run(parse_recipe(content, "test"), Stages(Console(quiet=True)))
    assert result.checks["generates_as_gated"] is True
    assert result.checks["reload"] == 0.0
    assert result.plan.removed_heads == 8
    pruned = load(result.folder / "model")
    assert any(not layer.self_attn.head_map.is_uniform for layer in pruned.model.layers)
    assert result.comparison.dense.quality["perplexity"] < 100
    assert sources.default_task(str(result.folder / "model")) == "standard-library-text"
