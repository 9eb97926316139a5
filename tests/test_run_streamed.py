"""A run that reads its model layer by layer ends as one in memory."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from streamed_models import SHARED_LAYERS, SHARING, batches_of_tokens, sharded_folder

from headprune import run as run_module
from headprune import run_streamed, run_values, sources
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import Task, register_task
from headprune.models.shards import open_shards
from headprune.recipe import parse_recipe
from headprune.report.progress import Stages
from headprune.report.run_folder import read_run
from headprune.scoring import score_observations
from headprune.surgery import load

CPU = torch.device("cpu")


@register_task
class Tokens(Task):
    """The loss of a random decoder on random tokens."""

    name = "tokens-for-tests"
    headline = "loss"
    higher_is_better = False

    def __init__(self, tokenizer) -> None:
        self.tokenizer = None
        self.calibration = batches_of_tokens()

    def loss(self, model, batch):
        logits = self.forward(model, batch).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="none").view(4, -1).mean(1)

    def forward(self, model, batch):
        return model(**batch)

    @torch.no_grad()
    def evaluate(self, model, progress=None):
        return {"loss": float(self.loss(model, self.calibration[0]).mean())}

    @torch.no_grad()
    def outputs(self, model):
        return self.forward(model, self.calibration[1]).logits

    def latency_inputs(self):
        return self.calibration[0]


@pytest.fixture
def recipe(tmp_path, monkeypatch, request):
    family, options = getattr(request, "param", ("llama", {}))
    monkeypatch.setattr(sources, "tokenizer_of", lambda folder, images=False: object())
    content = {
        "model": str(sharded_folder(family, tmp_path / "model", **options)), "task": {"name": "tokens-for-tests"},
        "output": str(tmp_path / "run"), "evaluate": {"repeats": 2}, "memory": "streamed",
    }  # fmt: skip
    return parse_recipe(content, "test")


def carried_out(recipe, console=None):
    return run_module.run(recipe, Stages(console or Console(quiet=True)))


@pytest.mark.parametrize("recipe", [("llama", {}), *((family, SHARED_LAYERS) for family in SHARING)], indirect=True)
def test_streamed_and_resident_runs_leave_the_same_model(recipe, capsys):
    console = Console(width=160, record=True)
    found = carried_out(recipe, console)
    expected = carried_out(recipe.model_copy(update={"output": recipe.output + "-resident", "memory": "resident"}))
    assert found.plan.keep == expected.plan.keep
    assert found.comparison.pruned.quality == expected.comparison.pruned.quality
    assert found.comparison.pruned.parameters == expected.comparison.pruned.parameters
    pruned, other = (load(result.folder / "model").state_dict() for result in (found, expected))
    assert all(torch.equal(tensor, other[name]) for name, tensor in pruned.items())
    assert json.loads((found.folder / "checks.json").read_text())["checks"] == {"cut_equals_gated": True}
    assert not (found.folder / "states").exists()
    assert "memory, streamed" in console.export_text()


def test_a_model_that_does_not_fit_is_streamed_by_itself(recipe, monkeypatch):
    automatic = recipe.model_copy(update={"memory": "auto"})
    assert not run_streamed.reads_streamed(automatic, CPU)
    monkeypatch.setattr(run_streamed, "COPIES", 10**9)
    assert run_streamed.reads_streamed(automatic, CPU)
    assert not run_streamed.reads_streamed(recipe.model_copy(update={"memory": "resident"}), CPU)


def test_weights_that_are_no_safetensors_are_left_to_a_run_in_memory(recipe, tmp_path):
    whole = load(recipe.model)
    whole.config.save_pretrained(tmp_path / "pickled")
    torch.save(whole.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    automatic = {"memory": "auto", "model": str(tmp_path / "pickled")}
    assert not run_streamed.reads_streamed(recipe.model_copy(update=automatic), CPU)


def test_a_model_of_the_hub_that_does_not_fit_is_streamed_too(recipe, monkeypatch):
    monkeypatch.setattr(run_streamed, "COPIES", 10**9)
    monkeypatch.setattr(run_streamed, "model_folder", lambda name: Path(recipe.model))
    assert run_streamed.reads_streamed(recipe.model_copy(update={"memory": "auto", "model": "owner/name"}), CPU)


def test_a_model_that_the_gpu_does_not_hold_is_streamed_through_it(recipe, monkeypatch):
    automatic, gpu = recipe.model_copy(update={"memory": "auto"}), torch.device("cuda")
    weights = open_shards(automatic.model).nbytes
    for free, streamed in ((3 * weights, False), (3 * weights - 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert run_streamed.reads_streamed(automatic, gpu) is streamed


@pytest.mark.parametrize(
    ("told", "name"),
    [("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("NVIDIA H200", "h200"), ("RTX", None)],
)
def test_a_gpu_is_known_by_what_it_says(monkeypatch, told, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: told)
    assert run_streamed.known_name(torch.device("cuda")) == name
    assert run_streamed.known_name(CPU) == "cpu"


def test_portraits_of_a_streamed_decoder_are_without_induction(recipe):
    wanting = recipe.model_copy(update={"report": recipe.report.model_copy(update={"portraits": True})})
    found = read_run(carried_out(wanting).folder).portraits
    assert found
    assert not any("probe_induction" in head.evidence for heads in found.values() for head in heads)


def test_a_criterion_that_was_refused_may_be_exchanged(recipe, tmp_path):
    """Nothing was made by it yet."""
    wrong = recipe.model_copy(update={"score": recipe.score.model_copy(update={"criterion": "shapley"})})
    with pytest.raises(InvalidInput, match="shapley cannot be observed layer by layer; choose criteria of"):
        carried_out(wrong)
    assert carried_out(recipe).report.exists()
    with pytest.raises(InvalidInput, match="another recipe"):
        carried_out(wrong)


def test_a_run_that_was_killed_between_its_files_of_scores_makes_the_same_pass_again(recipe, monkeypatch):
    """With fewer needs its states would be another pass's, and sums may be rounded otherwise."""
    wanting = recipe.model_copy(update={"report": recipe.report.model_copy(update={"criteria": ["entropy"], "portraits": True})})
    expected = carried_out(wanting.model_copy(update={"output": recipe.output + "-whole"}))

    def killed(observed, name, *options):
        if name == recipe.score.criterion:
            raise KeyboardInterrupt
        return score_observations(observed, name, *options)

    with monkeypatch.context() as patch:
        patch.setattr(run_values, "score_observations", killed)
        with pytest.raises(KeyboardInterrupt):
            carried_out(wanting)
    assert {"portraits.json", "scores-entropy.json"} < {path.name for path in Path(recipe.output).iterdir()}
    result = carried_out(wanting)
    for name in ("scores.json", "scores-entropy.json", "portraits.json", "plan.json"):
        assert (result.folder / name).read_bytes() == (expected.folder / name).read_bytes()


def test_what_takes_the_whole_model_is_refused_at_once(recipe, tmp_path):
    wanting = recipe.model_copy(update={"report": recipe.report.model_copy(update={"sensitivity": True})})
    with pytest.raises(InvalidInput, match=r"report\.sensitivity takes the whole model"):
        carried_out(wanting)
    assert not (tmp_path / "run").exists()
