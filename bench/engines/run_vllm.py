"""Runs exported folders in vLLM, in the engine's own Python: numpy and vllm, nothing of headprune.

    python run_vllm.py requests.json      # a list of {"model", "tokens", "new_tokens", "output"}

For each request it writes output.npz: logits [tokens, vocabulary], which are log-probabilities here; `greedy`, the tokens that
follow; `architecture`, the class that vLLM took.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np
import torch
import transformers
import vllm
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def main(path: str) -> None:
    for request in json.loads(Path(path).read_text(encoding="utf-8")):
        np.savez(request["output"], **answer(request))
        cleanup_dist_env_and_memory()
    versions = {module.__name__: module.__version__ for module in (vllm, torch, transformers)}
    print(json.dumps({**versions, "platform": vllm.platforms.current_platform.device_name}))


def answer(request: dict) -> dict[str, np.ndarray]:
    model = vllm.LLM(
        request["model"], trust_remote_code=True, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        max_model_len=128, max_num_seqs=1, max_logprobs=-1,
    )  # fmt: skip
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    (found,) = model.generate([{"prompt_token_ids": request["tokens"]}], sampling)
    rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
    return {
        "logits": np.array([[row[token].logprob for token in range(len(row))] for row in rows]),
        "greedy": np.array(found.outputs[0].token_ids),
        "architecture": np.array(model.llm_engine.model_config.architecture),
    }


if __name__ == "__main__":
    main(sys.argv[1])
