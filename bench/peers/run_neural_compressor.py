"""Intel Neural Compressor: its head pattern ("mha") with SNIP momentum scores over all layers, cut by model_slim."""

import torch
from child import Request, main
from neural_compressor import WeightPruningConfig
from neural_compressor.compression.pruner import model_slim, prepare_pruning


def score(model, request: Request):
    """Zeroes the lowest heads' weights after the last batch."""
    last = len(request.calibration)
    wanted = {
        "pattern": "mha", "pruning_scope": "global", "pruning_type": "snip_momentum", "target_sparsity": request.heads,
        "start_step": last, "end_step": last, "pruning_frequency": 1,
    }  # fmt: skip
    model.config.return_dict = False  # it reads the model through torch.jit.trace
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    prepare_pruning(model, WeightPruningConfig([wanted]), optimizer)
    for batch in [*request.calibration, request.calibration[0]]:
        request.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return


def cut(model, scored, request: Request):
    return model_slim(model, round_multiplier=1)


main(score, cut)
