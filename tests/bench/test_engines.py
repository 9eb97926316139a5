"""The comparison with llama.cpp: what it asks of the engine, and what it takes for equal."""

import ast
from pathlib import Path

import numpy as np
import pytest
from engines import compare
from engines.models import SIZES

ASKED = [
    ("llama.cpp", "llama, ragged, a layer without heads"),
    ("llama.cpp", "qwen3, ragged, tied"),
    ("vllm", "qwen2, ragged, biases of q, k and v"),
    ("vllm", "llama, groups and an attention gone"),
]


@pytest.fixture(params=ASKED, ids=lambda asked: asked[1])
def asked(request, tmp_path):
    pytest.importorskip("gguf")
    name, model = request.param
    engine = compare.ENGINES[name]
    case = next(case for case in engine.cases if case.name == model)
    return case, compare.prepared(case, tmp_path / "0", engine)


def answer(case, ours: dict, logits: np.ndarray, greedy: list[int], architecture: str | None = None) -> None:
    np.savez(
        ours["request"]["output"], logits=logits, greedy=np.array(greedy), architecture=np.array(architecture or case.architecture)
    )


def test_an_equal_answer_passes_and_a_wrong_one_does_not(asked):
    case, ours = asked
    assert ours["logits"].shape == (compare.PROMPT, SIZES["vocab_size"])
    answer(case, ours, ours["logits"] * (1 + 1e-6), ours["greedy"])
    found = compare.row(case, ours)
    assert found["equal"]
    assert found["architecture"] == case.architecture
    assert found["dense_difference"] > 1000 * found["logit_error"]
    answer(case, ours, ours["dense"], ours["greedy"])
    assert not compare.row(case, ours)["equal"]
    answer(case, ours, ours["logits"], [*ours["greedy"][:-1], ours["greedy"][-1] ^ 1])
    found = compare.row(case, ours)
    assert (found["equal"], found["same_greedy_tokens"]) == (False, compare.NEW_TOKENS - 1)
    answer(case, ours, ours["logits"], ours["greedy"], "something else")
    assert not compare.row(case, ours)["equal"]


@pytest.mark.parametrize(
    ("script", "packages"), [("run_gguf.py", {"llama_cpp"}), ("run_vllm.py", {"os", "torch", "transformers", "vllm"})]
)
def test_what_an_engine_runs_needs_nothing_of_ours(script, packages):
    tree = ast.parse(Path(compare.__file__).with_name(script).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "json", "sys", "pathlib", "numpy"} | packages
