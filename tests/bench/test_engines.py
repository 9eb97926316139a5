"""The comparison with llama.cpp: what it asks of the engine, and what it takes for equal."""

import ast
from pathlib import Path

import numpy as np
import pytest
from engines import compare
from engines.models import CASES, SIZES

BY_NAME = {case.name: case for case in CASES if case.dtype == "f32"}
NAMES = ["llama, ragged, a layer without heads", "qwen3, ragged, tied", "qwen2, all layers alike"]


@pytest.fixture(params=NAMES)
def asked(request, tmp_path):
    pytest.importorskip("gguf")
    case = BY_NAME[request.param]
    return case, compare.prepared(case, tmp_path / "0")


def answer(ours: dict, logits: np.ndarray, greedy: list[int]) -> None:
    np.savez(ours["request"]["output"], logits=logits, greedy=np.array(greedy))


def test_an_equal_answer_passes_and_a_wrong_one_does_not(asked):
    case, ours = asked
    assert ours["logits"].shape == (compare.PROMPT, SIZES["vocab_size"])
    answer(ours, ours["logits"] * (1 + 1e-6), ours["greedy"])
    found = compare.row(case, ours)
    assert found["equal"]
    assert found["architecture"] == case.architecture
    assert found["dense_difference"] > 1000 * found["logit_error"]
    answer(ours, ours["dense"], ours["greedy"])
    assert not compare.row(case, ours)["equal"]
    answer(ours, ours["logits"], [*ours["greedy"][:-1], ours["greedy"][-1] ^ 1])
    found = compare.row(case, ours)
    assert (found["equal"], found["same_greedy_tokens"]) == (False, compare.NEW_TOKENS - 1)


def test_the_engine_script_needs_numpy_and_llama_cpp_alone():
    tree = ast.parse(Path(compare.__file__).with_name("run_gguf.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "json", "sys", "pathlib", "llama_cpp", "numpy"}
