"""Greedy tokens of a few prompts, each by itself and in transformers' continuous batching. Knows nothing of headprune."""

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3], [4, 4, 9, 8]]


def alone(model) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([one]), **options)[0, len(one) :].tolist() for one in PROMPTS]


def together(model, **options) -> list[list[int]]:
    config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(PROMPTS, generation_config=generation, continuous_batching_config=config, **options)
    return [one.generated_tokens for one in found.values()]
