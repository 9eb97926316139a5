"""What a peer's process hands back, what the table says of it, and why a package is not there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peers import child, environments
from peers.compare import carried_out
from peers.known import PEERS
from peers.registry import Peer
from peers.table import markdown
from tiny_models import llama, tokens

from headprune.surgery import save


@pytest.fixture
def request_file(tmp_path):
    """A decoder's request, as compare.py writes it."""
    save(llama(), tmp_path / "model")
    batches = {
        "calibration": [{"input_ids": tokens(4, 9, seed), "labels": tokens(4, 9, seed)} for seed in range(2)],
        "test": [{"input_ids": tokens(4, 9, seed)} for seed in (7, 8)], "prompt": {"input_ids": tokens(2, 5, 3)},
    }  # fmt: skip
    torch.save(batches, tmp_path / "batches.pt")
    content = {
        "model": str(tmp_path / "model"), "kind": "decoder", "heads": 0.5, "options": {}, "packages": ["torch", "no-such-package"],
        "batches": str(tmp_path / "batches.pt"), "output": str(tmp_path / "outputs.pt"),
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(content))
    return tmp_path / "request.json"


def handed_back(monkeypatch, capsys, request_file, *functions):
    monkeypatch.setattr(sys, "argv", ["child", str(request_file)])
    child.main(*functions)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_child_tells_what_is_left_whether_it_loads_and_generates(monkeypatch, capsys, request_file):
    found = handed_back(monkeypatch, capsys, request_file, lambda model, request: request.notes.append("said"), same)
    assert found["query_rows"] == [64, 64]
    assert (found["kept"], found["generates"], found["notes"]) == ("yes", "yes", ["said"])
    assert found["versions"]["no-such-package"] is None
    with torch.no_grad():
        losses = [llama()(input_ids=ids, labels=ids).loss for ids in (tokens(4, 9, 7), tokens(4, 9, 8))]
    written = torch.load(request_file.with_name("outputs.pt"))
    assert written.view(2, 4).mean(dim=1) / 8 == pytest.approx(torch.stack(losses).double(), rel=1e-5)


def same(model, scored, request):
    return model


def test_a_model_that_its_config_does_not_tell_of_is_not_kept_whole(monkeypatch, capsys, request_file):
    def narrower(model, scored, request):
        for layer in model.model.layers:
            attention = layer.self_attn
            for part, rows in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
                part.weight = torch.nn.Parameter(part.weight[:rows].clone())
            attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :32].clone())
        return model

    found = handed_back(monkeypatch, capsys, request_file, lambda model, request: None, narrower)
    assert found["query_rows"] == [32, 32]
    assert found["kept"].startswith("no: ")
    assert found["generates"] == "yes"


def test_a_failing_peer_hands_back_its_error(monkeypatch, capsys, request_file):
    def fails(model, request):
        raise ValueError("no such head\nand more")

    assert handed_back(monkeypatch, capsys, request_file, fails, same)["failed"] == "ValueError: no such head"


def test_a_script_that_does_not_start_says_its_last_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import a_package_that_nobody_has")
    found = carried_out([sys.executable, str(script), str(tmp_path / "request.json")], own=True)
    assert found == {"failed": "ModuleNotFoundError: No module named 'a_package_that_nobody_has'", "stage": "import"}


def test_why_pip_failed_is_its_last_error_and_the_exception_behind_it():
    said = (
        "  ModuleNotFoundError: No module named 'x'\n  error: subprocess-exited-with-error\nERROR: Could not build wheels for y\n"
    )
    assert environments.why(said) == "ModuleNotFoundError: No module named 'x'; Could not build wheels for y"
    assert environments.why("") == "no reason given"


def test_the_table_has_every_peer_with_its_result_or_its_reason():
    peers = {"one": Peer("one", "torch", "run.py"), "two": Peer("two", "two", "run.py"), "three": Peer("three", "", None)}
    rows = [
        {"model": "m", "peer": "dense", "heads": 0.5, "task": "t", "headline": "mrr", "higher_is_better": True, "quality": 0.8,
         "query_heads": [4, 4]},
        {"model": "m", "peer": "one", "heads": 0.5, "quality": 0.4, "query_heads": [3, 1], "peak_mb": 9.6, "kept": "yes",
         "generates": None, "versions": {"torch": "2"}, "notes": ["halved"]},
        {"model": "m", "peer": "two", "heads": 0.5, "failed": "no wheel", "stage": "install"},
        {"model": "m", "peer": "three", "heads": 0.5, "lacks": "no heads"},
    ]  # fmt: skip
    text = markdown(rows, peers)
    assert "| one 2 | 4 | 0.500 | 10 | yes |" in text
    assert "- one 2: halved." in text
    assert "- two is not installed: `no wheel`" in text
    assert "- three: no heads" in text
    assert "score and cut" not in text


def test_every_peer_has_a_script_or_says_what_it_lacks():
    folder = Path(child.__file__).parent
    for peer in PEERS.values():
        assert (folder / peer.script).is_file() if peer.script else peer.lacks
