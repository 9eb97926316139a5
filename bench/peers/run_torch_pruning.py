"""Torch-Pruning: its group Taylor importance and head pruning, as in bench/quality."""

import sys
from pathlib import Path
from types import SimpleNamespace

from child import Request, main

sys.path.append(str(Path(__file__).parents[1]))
from quality.torch_pruning_heads import cut_by_torch_pruning, weights_with_gradients


def setting_of(model, request: Request):
    """What bench/quality hands to its methods, as far as this one reads it."""
    return SimpleNamespace(model=model, task=SimpleNamespace(calibration=request.calibration, loss=request.loss))


def score(model, request: Request):
    return weights_with_gradients(setting_of(model, request))


def cut(model, scored, request: Request):
    found = cut_by_torch_pruning(setting_of(model, request), scored, request.heads).model
    for parameter in found.parameters():
        parameter.grad = None
    return found


main(score, cut)
