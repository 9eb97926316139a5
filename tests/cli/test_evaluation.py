"""Commands that measure models and this machine."""

import json

import pytest
from command_line import only_error
from letter_tokenizer import letter_tokenizer
from tiny_models import llama

from headprune.ops.extension import cpu_extension
from headprune.surgery import cut, save

TEXT = "whether tis nobler in the mind to suffer " * 6


@pytest.fixture
def folders(call):
    """A dense and a pruned decoder with a tokenizer of letters, and a text."""
    model, tokenizer = llama(), letter_tokenizer()
    save(model, "dense", tokenizer=tokenizer)
    cut(model, {"model.layers.0.self_attn": [0, 5], "model.layers.1.self_attn": [1, 2, 3]})
    save(model, "pruned", tokenizer=tokenizer)


def test_evaluate_compares_on_any_text_and_writes_a_trace(call, folders, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ("./pruned", "--against", "./dense", "--text", "text.txt", "--window", "32", "--repeats", "1")
    code, out, err = call("evaluate", *arguments, "--json", "--trace", "trace.json")
    assert code == 0, err
    found = json.loads(out)
    assert found["dense"]["parameters"] > found["pruned"]["parameters"]
    difference = found["differences"]["perplexity"]
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert {one["name"] for one in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]} >= {"dense", "pruned"}
    code, out, err = call("evaluate", "./pruned", "--text", "text.txt", "--window", "32", "--stride", "16", "--repeats", "1")
    assert code == 0, err
    assert "perplexity" in out
    assert "generation, ms/token" in out


def test_evaluate_rounds_the_weights_where_that_is_asked_for(call, folders, tmp_path):
    pytest.importorskip("torchao")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ("./pruned", "--text", "text.txt", "--window", "32", "--repeats", "1", "--json")
    forms = ((), ("--quantise", "int8"), ("--quantise", "w8a8"))
    plain, *in_forms = (json.loads(call("evaluate", *arguments, *more)[1]) for more in forms)
    for rounded in in_forms:
        assert rounded["weight_bytes"] < plain["weight_bytes"]
        assert rounded["model_flops"] == plain["model_flops"]  # products of integers count
        assert 0 < abs(rounded["quality"]["perplexity"] / plain["quality"]["perplexity"] - 1) < 0.1
    code, _, err = call("evaluate", *arguments[:-1], "--quantise", "int3")
    assert code == 2
    assert "unknown form of weights 'int3'" in only_error(err)


def test_evaluate_refuses_several_kinds_of_data_and_windows_that_do_not_fit(call, folders, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for arguments, names in [
        (["--text", "text.txt", "--task", "standard-library-text"], "--task and --text were given"),
        (["--text", "none.txt"], "none.txt does not exist"),
        (["--text", "text.txt", "--stride", "1000"], "stride=1000"),
        (["--text", "text.txt"], "takes at most 128"),
    ]:
        code, _, err = call("evaluate", "./pruned", *arguments)
        assert code == 2
        assert names in only_error(err)


def test_doctor_says_what_runs_each_operator(call):
    code, out, err = call("doctor")
    assert code == 0, err
    assert "attention_backward" in out
    assert "runs through" in out
    code, out, err = call("doctor", "--json")
    (row,) = (row for row in json.loads(out)["devices"] if row["device"] == "C++ kernels")
    assert row["what"] == str(cpu_extension())
