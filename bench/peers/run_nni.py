"""NNI: Taylor scores of whole heads (query, key and value together), cut by its ModelSpeedup with the replacer for attentions."""

import torch
from child import Request, main, reason
from nni.compression import TorchEvaluator
from nni.compression.pruning import TaylorPruner
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils.external.external_replacer import TransformersAttentionReplacer


def settings_of(model, request: Request):
    """Query, key and value of a layer together, in blocks of one head."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    stack = "encoder.layer.{}.attention.self." if request.kind == "encoder" else "model.layers.{}.self_attn."
    names = ("query", "key", "value") if request.kind == "encoder" else ("q_proj", "k_proj", "v_proj")
    return [
        {
            "op_names": [stack.format(layer) + name for name in names], "sparse_ratio": request.heads,
            "granularity": [head, config.hidden_size], "dependency_group_id": f"layer {layer}", "global_group_id": "all",
        }
        for layer in range(config.num_hidden_layers)
    ]  # fmt: skip


def score(model, request: Request):
    """Its masks, from gradients alone: the learning rate is 0."""
    import nni

    def train(model, optimizer, step, scheduler=None, max_steps=None, max_epochs=None):
        for batch in request.calibration:
            step(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    evaluator = TorchEvaluator(
        train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0), lambda batch: request.loss(model, batch)
    )
    pruner = TaylorPruner(model, settings_of(model, request), evaluator, training_steps=len(request.calibration))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def cut(model, scored, request: Request):
    sample = request.calibration[0]["input_ids"][:2]
    try:
        replacer = TransformersAttentionReplacer(model)
        return ModelSpeedup(model, dummy_input=sample, masks_or_file=scored, customized_replacers=[replacer]).speedup_model()
    except Exception as error:
        request.notes.append(
            f"its ModelSpeedup fails ({reason(error)}); the heads of its masks are cut by transformers' prune_heads"
        )
    heads = model.config.num_attention_heads
    gone = {}
    for name, masks in scored.items():
        if name.endswith("query"):
            kept = masks["weight"].view(heads, -1).amax(dim=1)
            gone[int(name.split(".")[2])] = [head for head in range(heads) if not kept[head]]
    model.prune_heads({layer: some for layer, some in gone.items() if some})
    return model


main(score, cut)
