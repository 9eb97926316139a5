"""Runs gguf files in llama.cpp, in the engine's own Python: numpy and llama_cpp, nothing of headprune.

    python run_gguf.py requests.json      # a list of {"model", "tokens", "new_tokens", "text", "usual", "output"}

usual: with flash attention and an f16 cache, as llama.cpp's own programs run by default; else both in fp32.

For each request it writes output.npz: logits [tokens, vocabulary] of one pass over `tokens`; `greedy`, the tokens that follow them,
each from a pass of one token on the cache; `architecture`, as it took it; `text_tokens`, what the file's tokenizer makes of `text`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(path: str) -> None:
    print(json.dumps({"llama-cpp-python": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}))
    for request in json.loads(Path(path).read_text(encoding="utf-8")):
        np.savez(request["output"], **answer(request))


def answer(request: dict) -> dict[str, np.ndarray]:
    tokens, wanted = request["tokens"], request["new_tokens"]
    cache = llama_cpp.GGML_TYPE_F16 if request["usual"] else llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        request["model"], n_ctx=len(tokens) + wanted, n_threads=2, logits_all=True, verbose=False, flash_attn=request["usual"],
        type_k=cache, type_v=cache,
    )  # fmt: skip
    model.eval(tokens)
    logits = model.scores[: len(tokens)].copy()
    greedy = [int(logits[-1].argmax())]
    while len(greedy) < wanted:
        model.eval(greedy[-1:])
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
    found = {"logits": logits, "greedy": np.array(greedy), "architecture": np.array(model.metadata["general.architecture"])}
    if request.get("text"):
        found["text_tokens"] = np.array(model.tokenize(request["text"].encode(), add_bos=False, special=False))
    model.close()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
