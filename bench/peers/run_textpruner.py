"""TextPruner (Yang et al. 2022): its importance by the loss, one ranking over all layers, one step; feed-forwards stay whole."""

import contextlib
import os
import sys
import tempfile

from child import Request, main
from textpruner import GeneralConfig, TransformerPruner, TransformerPruningConfig


def score(model, request: Request):
    """Its pruner scores and cuts in one call."""
    return


def cut(model, scored, request: Request):
    config = model.config
    settings = TransformerPruningConfig(
        target_ffn_size=config.intermediate_size, target_num_of_heads=round(config.num_attention_heads * (1 - request.heads)),
        pruning_method="iterative", n_iters=1, head_even_masking=False,
    )  # fmt: skip
    seen = []

    def remember(batch):
        seen.append(batch)
        return batch

    def loss(outputs):
        return request.loss(lambda **batch: outputs, seen[-1])

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        pruner = TransformerPruner(model, settings, GeneralConfig(use_device="cpu", output_dir=os.path.join(folder, "out")))
        pruner.prune(request.calibration, adaptor=loss, batch_postprocessor=remember, save_model=False)
    return model


main(score, cut)
