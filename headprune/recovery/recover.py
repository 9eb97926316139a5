"""Recovery: a pruned model is trained a little, by itself or by its dense original, so that it is as good again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headprune.arguments import check_arguments, check_options, keywords
from headprune.errors import InvalidInput, whole_number
from headprune.models.quantised import refuse_quantised
from headprune.models.streamed import refuse_streamed
from headprune.models.tokens import TokenMask
from headprune.nn.given import plain_module, refuse_sharded
from headprune.recovery.batches import as_dataset, first_batch, refuse_batching, refuse_unlabelled, steps_per_pass
from headprune.recovery.budget import TrainingBudget
from headprune.recovery.distillation import Distillation
from headprune.recovery.master_weights import master_weights, mixed_precision
from headprune.recovery.methods import get_method
from headprune.recovery.objective import Objective
from headprune.recovery.quantise import GROUP, rounded_layers
from headprune.recovery.result import WHAT, Recovery, first_rank, keep_result, refuse_differing_ranks, taken_up, told_apart
from headprune.recovery.rewind import RateRewind, Source, put_back, rewound_state
from headprune.recovery.rounded_weights import refuse_untrainable, rounded_weights
from headprune.recovery.session import Session, as_it_was, own_random_state, trained
from headprune.recovery.sharding import sharded, wants_sharding
from headprune.scoring.batch_identity import data_identity
from headprune.scoring.observer import LossFunction
from headprune.settings import described, write_settings
from headprune.surgery.record import share_gone

# Arguments of transformers that recovery decides itself, and what to do instead.
BY_TENTHS = "it evaluates at each tenth of the budget or every eval_steps, and the best evaluation stays"
DECIDED = {
    **dict.fromkeys(("max_steps", "num_train_epochs"), "give steps or minutes"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), "give lr as a function of the step"),
    **dict.fromkeys(("eval_strategy", "eval_delay", "eval_on_start"), BY_TENTHS),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), BY_TENTHS),
    "learning_rate": "give lr",
    "warmup_steps": "give warmup",
    "label_smoothing_factor": "give a loss_fn that smoothes labels",
    "save_strategy": "give output_dir, and save_steps for checkpoints at other times than each minute",
    "resume_from_checkpoint": "give output_dir, where a recovery that was killed goes on by itself",
}

# What counts steps or rows here; transformers also takes shares of the steps.
COUNTS = {"eval_steps", "save_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"}


def recover(
    model: nn.Module,
    train: Any,
    eval: Any = None,
    *,
    loss_fn: LossFunction | None = None,
    teacher: nn.Module | str | Path | None = None,
    method: str = "full",
    steps: int | None = None,
    minutes: float | None = None,
    lr: float | Callable[[int], float] | None = None,
    warmup: int | None = None,
    distil: Distillation | None = None,
    rewind: Source | RateRewind | None = None,
    quantise: str | None = None,
    output_dir: str | Path | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    patience: int = 3,
    seed: int = 0,
    dropout: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
    token_mask: TokenMask | None = None,
    data_collator: Callable[..., Any] | None = None,
    callbacks: Sequence[Any] = (),
    method_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **training_arguments: Any,
) -> Recovery:
    """Trains `model` in place, its heads as they are, through transformers.Trainer; leaves it in the mode it came in. A model on a
    GPU is trained on that one, a model on the CPU on the first GPU where there is one and use_cpu=True does not say otherwise.

    Args:
        train, eval: batches, each a dict for `model(**batch)` or anything that loss_fn understands; or a dataset of rows, which
            data_collator and per_device_train_batch_size make batches of. Without eval and metric the last weights stay, with
            them the best.
        loss_fn: `loss_fn(model, batch)` gives a loss (a tensor, of which the mean counts); default the output's `loss`.
        teacher: the dense model, also a quantised one, which is used as it is and never trained, or a folder of `store_logits`.
        method: "full", "projections" (of attention alone) or "lora" (method_options: rank, alpha, dropout, targets).
        steps, minutes: the budget, one of them; default three passes over `train`, all ranks together, and where more than half of
            the original's heads went six times their share (4.5 for 75 %). Minutes are by `clock`, evaluation included.
        lr: peak learning rate (default: the method's), reached after `warmup` steps, then falling linearly to 0; or the rate
            itself as a function of the step.
        distil: weights of the distillation terms; default with a teacher: the logits, or of an encoder without a head its
            embedding and hidden states.
        rewind: an earlier checkpoint (folder, state_dict or the unpruned module), whose weights are sliced into the model before
            training; or RateRewind, which keeps the weights and repeats the learning rates.
        quantise: "int8", "int4" or "w8a8": trains for weights (of the last activations too) that are rounded so afterwards
            (quantisation-aware training): every pass, evaluations too, sees them rounded as `hp.recovery.quantise` does, while the
            model's own stay in floating point.
        output_dir: keeps checkpoints and the result; where a killed recovery with the same arguments left some it goes on, and a
            finished one is read back.
        metric: `metric(model)`, higher is better, in place of the loss on `eval`.
        patience: stop after so many evaluations without a better one. They happen at each tenth of the budget, or every
            `eval_steps`.
        dropout: train in training mode, with dropout; default: where there is no teacher. What method adds is always trained so.
        clock: gives seconds; time.process_time counts CPU minutes, which do not hang on what else the machine does.
        token_mask: which tokens count in distillation, as for `observe`.
        callbacks: more of transformers' TrainerCallback.
        progress: called with (done, all) after each step.
        training_arguments: any of transformers.TrainingArguments (bf16, gradient_accumulation_steps, report_to, deepspeed,
            save_steps, ...). Under torchrun each rank trains on its share of the batches; fsdp=True shards the model and a teacher
            at hand over the ranks (FSDP2) and gathers them afterwards; deepspeed takes ZeRO stages 0 to 2. A model in half
            precision is trained in fp32 with bf16 autocast, and rounded at the end, unless bf16 or fp16 is given.

    A loss that becomes NaN ends the training: the model goes back to its last good state and `stopped_because` says where.

    Raises InvalidInput where there is no loss, the teacher or the rewind checkpoint does not fit, the first loss is not finite,
    output_dir holds another recovery, or an argument is unknown.
    """
    model = plain_module(model)
    check_arguments(recover, locals())
    refuse_sharded(model)
    refuse_quantised(
        model,
        "recovery does not train; do that before the model is quantised, or train adapters on it with peft (docs/large-models.md)",
    )
    refuse_streamed(model, "where recovery does not train them", "recover what hp.load gives")
    chosen = get_method(method)
    chosen.refuse_unknown(method_options or {})
    if quantise is not None:
        refuse_untrainable(quantise, method)
        rounded_layers(model, quantise, GROUP)
    if training_arguments:
        refuse_decided(training_arguments)
        check_options("recover", training_arguments, recover_options())
        for name in COUNTS & {name for name, value in training_arguments.items() if value is not None}:
            whole_number(name, training_arguments[name])
    shards, mixed = wants_sharding(training_arguments), mixed_precision(model, training_arguments)
    training_arguments |= mixed
    if isinstance(rewind, RateRewind):
        lr, steps, warmup = rewind if lr is None else lr, steps or (None if minutes else rewind.steps), warmup or 0
    data, held_out = as_dataset(train, "train"), None if eval is None else as_dataset(eval, "eval")
    for name, given in (("train", data), ("eval", held_out)):
        refuse_batching(name, given, training_arguments)
        if loss_fn is None and (teacher is None or (distil is not None and distil.task)):
            refuse_unlabelled(name, given, each=name == "eval" and metric is None)
    whole_number("patience", patience)
    whole_number("seed", seed, least=0)
    per_pass, rate = steps_per_pass(data, training_arguments), chosen.lr if lr is None else lr
    budget = TrainingBudget.of(steps, minutes, warmup, rate, per_pass, share_gone(model))
    objective = Objective(model, loss_fn=loss_fn, teacher=teacher, distil=distil, token_mask=token_mask)
    folder = None if output_dir is None else Path(output_dir)
    rewound = None if rewind is None or isinstance(rewind, RateRewind) else rewound_state(model, rewind)
    settings = {
        "method": method, **budget.to_json(), "seed": seed, "train": data_identity(train), "eval": data_identity(eval),
        "teacher": told_apart(teacher) if isinstance(teacher, nn.Module) else None if teacher is None else str(teacher),
        "functions": [described(one) for one in (loss_fn, metric, token_mask, data_collator)],
        "distil": None if distil is None else distil.to_json(), "patience": patience, "dropout": dropout,
        **({} if quantise is None else {"quantise": quantise}), "method_options": repr(sorted((method_options or {}).items())),
        "training_arguments": repr(sorted(training_arguments.items())), **told_apart(model if rewound is None else rewound),
    }  # fmt: skip
    finished = taken_up(model, folder, settings)
    if finished is not None:
        return finished
    if rewound is not None:
        put_back(model, rewound)
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        work = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headprune-")))
        place = next(model.parameters()).device
        session = Session(
            data, held_out, objective, budget, work, folder is not None, clock, metric, patience, seed,
            teacher is None if dropout is None else dropout, data_collator, callbacks, progress, shards, place,
            training_arguments,
        )  # fmt: skip
        device = session.device  # where the ranks meet
        refuse_differing_ranks(settings, folder is not None)
        stack.enter_context(torch.cuda.device(device) if device.type == "cuda" else nullcontext())  # whose random state is kept
        at_first = place if shards else device  # sharded layers go there one by one
        stack.enter_context(as_it_was(model))
        stack.enter_context(own_random_state(seed))
        model.to(at_first)
        stack.callback(model.to, place)
        stack.enter_context(objective.ready(device, to_device(first_batch(data, data_collator), at_first), shards))
        spread = sharded(model, device) if shards else nullcontext()
        still = () if session.dropout else tuple(model.modules())
        with ExitStack() as inside:
            inside.enter_context(chosen.prepare(model, **(method_options or {})))
            inside.enter_context(nullcontext() if quantise is None else rounded_weights(model, quantise))
            inside.enter_context(master_weights(model, bool(mixed)))
            inside.enter_context(objective.sharing())
            inside.enter_context(spread)
            inside.enter_context(session.checkpointing(model))
            if folder is not None and first_rank():
                write_settings(folder, WHAT, settings)
            result = trained(model, session, still)
    if not result.diverged:  # what went wrong may be put right, and then the training goes on
        keep_result(model, folder, result)
    return result


def recover_options() -> list[str]:
    """What `recover` takes by name: its own arguments and those of transformers that it hands on."""
    from transformers import TrainingArguments  # takes a second to import

    return ["eval", *keywords(recover), *(entry.name for entry in fields(TrainingArguments) if entry.name not in DECIDED)]


def refuse_decided(options: Iterable[str]) -> None:
    """InvalidInput for an argument of transformers that would be taken and not read."""
    for name in options:
        if name in DECIDED:
            raise InvalidInput(f"recover does not read {name} of transformers.TrainingArguments; {DECIDED[name]}.")


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        made_of = getattr(batch, "_make", type(batch))  # _make: of a named tuple
        return made_of(to_device(value, device) for value in batch)
    return batch
