"""nn_pruning (Lagunas et al. 2021): heads as blocks of weights, here by magnitude, which needs no training."""

from child import Request, main
from nn_pruning.inference_model_patcher import optimize_model
from nn_pruning.patch_coordinator import ModelPatchingCoordinator, SparseTrainingArguments


def score(model, request: Request):
    """Masks of blocks of one head, by magnitude."""
    head = model.config.hidden_size // model.config.num_attention_heads
    arguments = SparseTrainingArguments(
        dense_pruning_method="disabled", attention_pruning_method="magnitude", attention_block_rows=head,
        attention_block_cols=model.config.hidden_size, final_threshold=1 - request.heads, initial_warmup=0, final_warmup=0,
    )  # fmt: skip
    coordinator = ModelPatchingCoordinator(arguments, "cpu", "", "bert", "dense", logit_names="logits", teacher_constructor=None)
    coordinator.patch_model(model)
    coordinator.schedule_threshold(step=1, total_step=1, training=False)
    coordinator.compile_model(model)
    return


def cut(model, scored, request: Request):
    return optimize_model(model, "dense")


main(score, cut)
