"""Models by their names on the Hub: a small server speaks the part of its protocol that is needed."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from letter_tokenizer import letter_tokenizer
from tiny_models import llama
from transformers import AutoModelForCausalLM

import headprune as hp
from headprune.errors import InvalidInput
from headprune.hub import known_folder, local_folder
from headprune.sources import open_model

COMMIT = hashlib.sha1(b"a model").hexdigest()
NAME = "owner/a-model"


class Hub(BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if path in (f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/revision/v1"):
            content = json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}).encode()
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)} for name, file in files.items()
            ]
            content = json.dumps(entries).encode()
        elif (name := path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in files:
            content = files[name].read_bytes()
            self.asked.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one model, and an empty cache. Yields (the model, which files were asked for)."""
    folder = tmp_path / "on the hub"
    model = llama().eval()
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights")
    kind = type("OurHub", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield model, kind.asked
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub_is_fetched_once_and_found_again_offline(hub, monkeypatch):
    model, asked = hub
    tokens = {"input_ids": torch.arange(5)[None]}
    expected = model(**tokens).logits
    assert torch.equal(hp.load(NAME)(**tokens).logits, expected)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(asked)
    assert not {"pytorch_model.bin", "onnx/config.json"} & set(asked)
    asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(hp.load(NAME)(**tokens).logits, expected)
    assert torch.equal(hp.load(f"{NAME}@{COMMIT}")(**tokens).logits, expected)
    assert torch.equal(hp.open_streamed(NAME)(**tokens).logits, expected)
    assert not asked


def test_estimates_fetch_no_weights(hub, monkeypatch):
    model, asked = hub
    found = hp.estimate(NAME, hp.Budget(heads=0.5), device="h100", length=16)
    assert found.dense.parameters == model.num_parameters()
    assert "config.json" in asked
    assert "model.safetensors" not in asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match=r"cache does not hold all of a model of that name. `hf download owner/a-model`"):
        hp.load(NAME)
    with pytest.raises(InvalidInput, match=r"`hf download owner/a-model --revision v2`"):
        hp.load(f"{NAME}@v2")


def test_weights_of_the_older_form_are_fetched_where_there_are_no_others(hub, tmp_path):
    (tmp_path / "on the hub" / "model.safetensors").unlink()
    local_folder(NAME)
    assert "pytorch_model.bin" in hub[1]


def test_pruning_in_files_and_in_memory_take_the_tokenizer_from_the_cache(hub, tmp_path, monkeypatch):
    sites = {f"model.layers.{layer}.self_attn": [0, 1] for layer in range(2)}
    plan = hp.PruningPlan.from_keep(hub[0], sites)
    hp.prune_folder(NAME, plan, tmp_path / "by files")
    assert (tmp_path / "by files" / "tokenizer.json").is_file()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = known_folder(NAME)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.name_or_path = NAME  # what it is where transformers was given the name
    hp.prune(model, plan)
    hp.save(model, tmp_path / "in memory")
    assert (tmp_path / "in memory" / "tokenizer.json").is_file()


def test_what_is_nowhere_is_told_in_one_line(hub, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match=r"owner/another is no folder, and the Hub does not give a model of that name"):
        hp.load("owner/another")
    with pytest.raises(InvalidInput, match=r"owner/a-model@v7 is no folder, and the Hub does not give"):
        hp.load(f"{NAME}@v7")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match=r"owner/another is no folder, and .*HF_HUB_OFFLINE=0 headprune does"):
        open_model("owner/another")
    assert known_folder("owner/another") is known_folder("") is known_folder(None) is None
    for name in ("runs/a--model", "runs/a..model"):  # what the Hub gives nobody as a name
        assert known_folder(name) is None
        with pytest.raises(InvalidInput, match=f"{name} is no model folder: it does not exist"):
            hp.load(name)
    with pytest.raises(InvalidInput, match=r"nothing is no model folder: it does not exist"):
        hp.load(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match=r"unknown model \(no folder, no owner/name on the Hub"):
        open_model("gpt2")
