"""Commands and recipes on data in files of one's own."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from command_line import only_error
from letter_tokenizer import LETTERS, letter_tokenizer
from PIL import Image
from tiny_embedder import saved_embedder, saved_pairs, write_json
from tiny_encoders import T5, VISION
from tiny_models import llama
from transformers import AutoModel, SiglipConfig, SiglipForImageClassification, T5Config, T5ForConditionalGeneration

import headprune as hp

RECIPE = Path(__file__).parents[2] / "recipes" / "own-text.yaml"


@pytest.fixture
def decoder(tmp_path):
    """A folder with a model and its tokenizer, and a text."""
    llama().save_pretrained(tmp_path / "dense")
    letter_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "own.txt").write_text("".join(random.Random(0).choices(LETTERS, k=3000)))
    return tmp_path / "dense"


@pytest.fixture
def images(tmp_path):
    """A folder of 20 images in 5 classes."""
    for number in range(20):
        folder = tmp_path / "images" / f"class{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), number * 10).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def succeed(call):
    """Calls that end well: stdout of the last."""

    def calls(*commands):
        for command in commands:
            code, out, err = call(*command)
            assert code == 0, err
        return out

    return calls


def saved_with_processor(model, folder, kind: str):
    """`model` and an image processor for it."""
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"image_processor_type": kind, "size": {"height": 16, "width": 16}})
    return folder


def recipe(model, task: str, options: dict, **sections) -> Path:
    """A recipe's file, whose run goes to the folder `run`."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    content = {
        "model": str(model),
        "task": {"name": task, "options": given},
        "evaluate": {"repeats": 1},
        "output": "run",
    } | sections
    Path("own.yaml").write_text(yaml.safe_dump(content))
    return Path("own.yaml")


def test_the_whole_way_on_a_text_by_commands(succeed, decoder, tmp_path):
    task = f"text,calibration={tmp_path / 'own.txt'},window=16,batch=8"
    out = succeed(
        ("score", decoder, "--task", task),
        ("plan", "scores.json", "--heads", "0.5", "-o", "plan.json"),
        ("prune", decoder, "plan.json", "--task", task, "-o", "pruned"),
        ("recover", "pruned", "--teacher", decoder, "--task", task, "--steps", "2", "-o", "recovered"),
        ("evaluate", "recovered", "--against", decoder, "--task", task, "--json"),
    )
    quality = json.loads(out)["pruned"]["quality"]
    assert quality["perplexity"] > 1
    assert sum(site.head_map.query_heads for site in hp.attention_sites(hp.load("recovered"))) == 8


def test_an_option_that_is_none_is_told_before_the_window_and_the_model(call, decoder):
    for model in (decoder, "nowhere"):
        for command in (
            ("score", model, "--task", "text,calibration=nowhere.txt,colum=text"),
            ("run", recipe(model, "text", {"calibration": "nowhere.txt", "window": 129, "colum": "text"})),
        ):
            code, _, err = call(*command)
            assert code == 2
            assert "options of task text: got an unexpected keyword argument 'colum'; it takes calibration" in only_error(err)


def test_a_teacher_that_the_task_is_not_for_is_refused(call, decoder, tmp_path):
    vocabulary = json.loads((decoder / "config.json").read_text())["vocab_size"]
    T5ForConditionalGeneration(T5Config(**{**T5, "vocab_size": vocabulary})).save_pretrained(tmp_path / "t5")
    task = ("--task", "text,calibration=own.txt,window=32", "--steps", "1")
    code, _, err = call("recover", decoder, "--teacher", tmp_path / "t5", *task, "-o", "recovered")
    assert code == 2
    assert "T5ForConditionalGeneration is an encoder-decoder" in only_error(err)
    assert not Path("recovered").exists()


def test_a_window_that_the_model_does_not_take_is_refused_before_the_text_is_read(call, decoder):
    for command in (
        ("score", decoder, "--task", "text,calibration=nowhere.txt"),
        ("evaluate", decoder, "--task", "text,calibration=nowhere.txt,window=129"),
        ("run", recipe(decoder, "text", {"calibration": "nowhere.txt"})),
    ):
        code, _, err = call(*command)
        assert code == 2
        assert "LlamaForCausalLM takes at most 128; give window=128" in only_error(err)
    code, _, err = call("score", decoder, "--task", "text,calibration=nowhere.txt,window=128")
    assert "nowhere.txt does not exist" in only_error(err)


def test_the_recipe_for_ones_own_text_runs(succeed, decoder, tmp_path):
    text = f"task.options.calibration={tmp_path / 'own.txt'}"
    succeed(("run", RECIPE, f"model={decoder}", text, "task.options.window=16", "evaluate.repeats=1", "output=run"))
    assert sum(site.head_map.query_heads for site in hp.attention_sites(hp.load("run/model"))) == 12


@pytest.mark.parametrize("streamed", [(), ("--streamed",)])
@pytest.mark.parametrize("named", [True, False])  # whether `prune` is told the task, which says that the head is left out
def test_an_embedder_saved_as_a_language_model_goes_the_whole_way(succeed, tmp_path, streamed, named):
    dense, pairs = saved_embedder(tmp_path / "dense"), saved_pairs(tmp_path / "pairs.csv")
    task = ("--task", f"retrieval,calibration={pairs},batch=8")
    own = recipe(dense, "retrieval", {"calibration": pairs, "batch": 8}, memory="streamed" if streamed else "resident")
    succeed(
        ("score", dense, *task, *streamed),
        ("plan", "scores.json", "--heads", "0.4", "-o", "plan.json"),
        ("prune", dense, "plan.json", *(task if named else ()), *streamed, "-o", "pruned"),
        ("recover", "pruned", "--teacher", dense, *task, "--steps", "2", "-o", "recovered"),
        ("evaluate", "recovered", "--against", dense, *task, "--repeats", "1"),
        ("diff", dense, "pruned"),
        *([("run", own)] if named else []),
    )
    found = AutoModel.from_pretrained("recovered", trust_remote_code=True)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(found(ids).last_hidden_state, hp.load("recovered")(ids).last_hidden_state)
    assert json.loads(Path("recovered/config.json").read_text())["architectures"] == ["Qwen3Model"]
    assert Path("recovered/1_Pooling/config.json").exists()


def test_a_model_in_bf16_goes_through_a_run_with_recovery(succeed, decoder, tmp_path):
    model = llama().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(decoder)
    sections = {"plan": {"trials": 2}, "prune": {"feed_forward": True}, "recover": {"steps": 3}}
    succeed(("run", recipe(decoder, "text", {"calibration": tmp_path / "own.txt", "window": 16}, **sections)))
    assert hp.load(tmp_path / "run" / "recovered").dtype == torch.bfloat16
    checks = json.loads((tmp_path / "run" / "checks.json").read_text())["checks"]
    assert set(checks) == {"cut_equals_gated", "reload"}
    assert checks["cut_equals_gated"] < 0.1


def test_a_vision_transformer_is_scored_on_a_folder_of_images(call, succeed, images, tmp_path):
    model = saved_with_processor(VISION["vit"].make(), tmp_path / "vit", "ViTImageProcessor")
    code, _, err = call("score", model)
    assert code != 0
    assert "image-classification,calibration=FOLDER" in err
    succeed(("score", model, "--task", f"image-classification,calibration={images}"))
    assert len(hp.HeadScores.load("scores.json")) == 2


def test_a_classifier_with_an_attention_that_is_not_used_keeps_its_heads_where_that_is_asked_for(call, succeed, images, tmp_path):
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(text_config={**tower, "vocab_size": 20}, vision_config={**tower, "image_size": 16, "patch_size": 8})
    config.num_labels = 5
    torch.manual_seed(0)
    model = saved_with_processor(SiglipForImageClassification(config), tmp_path / "siglip", "SiglipImageProcessor")
    task = f"image-classification,calibration={images}"
    code, _, err = call("score", model, "--task", task)
    assert code == 2
    assert "vision_model.head.attention not reached" in " ".join(err.split())
    assert "--keep-unreached" in err
    succeed(
        ("score", model, "--task", task, "--keep-unreached"),
        ("plan", "scores.json", "--heads", "0.3", "-o", "plan.json"),
        ("prune", model, "plan.json", "--task", task, "-o", "pruned"),
        ("evaluate", "pruned", "--against", model, "--task", task, "--repeats", "1"),
        ("run", recipe(model, "image-classification", {"calibration": images}, score={"unreached": "keep"})),
    )
    heads = {site.name: site.head_map.query_heads for site in hp.attention_sites(hp.load("pruned"))}
    assert heads["vision_model.head.attention"] == 4
    assert sum(heads.values()) < 12


def test_tasks_are_listed_with_their_options(succeed):
    found = {row["task"]: row["options"].split(", ") for row in json.loads(succeed(("tasks", "--json")))}
    assert set(found) >= {"docstring-retrieval", "text", "retrieval", "text-classification", "image-classification"}
    assert found["text"][:3] == ["calibration", "test", "training"]
    assert {"window=512", "seed=0"} <= set(found["text"])
    assert "prefix" in found["text-to-text"]
