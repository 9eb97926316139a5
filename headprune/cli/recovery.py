"""The command that recovers a pruned model."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from headprune.cli import completion, terminal
from headprune.cli.app import app
from headprune.cli.inputs import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    ModelOutputOption,
    OverwriteOption,
    TaskOption,
    opened,
    opened_model,
    refuse_replacing_source,
)
from headprune.cli.terminal import with_bar
from headprune.model_folder import refuse_replacing


@app.command("recover", epilog="Example: headprune recover ./pruned --teacher minilm --minutes 5 -o recovered")
def recover_command(
    model: ModelArgument,
    output: ModelOutputOption,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model to learn from; else the task's own loss counts.",
            autocompletion=completion.one_of(completion.models),
        ),
    ] = None,
    task: TaskOption = None,
    method: Annotated[
        str, typer.Option(help="full, projections or lora.", autocompletion=completion.one_of(completion.recovery_methods))
    ] = "full",
    steps: Annotated[
        int | None,
        typer.Option(
            help="How many steps to train; by default three passes over the data, more where over half of the heads went."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to train, in place of steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default the method's own.")] = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="int8, int4 or w8a8 (activations too): trains for weights rounded so afterwards, and tells their quality.",
            autocompletion=completion.one_of(completion.forms),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The order of the batches.")] = 0,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train a pruned model for a while on a task's training data, so that it is as good again; its quality on the task's test data
    is told before and after. A killed one goes on."""
    from headprune.evaluation.evaluate import quality_of
    from headprune.models.placement import chosen_device, trainer_options
    from headprune.recovery import recover
    from headprune.recovery.budget import TrainingBudget
    from headprune.recovery.methods import get_method
    from headprune.recovery.quantise import FORMS
    from headprune.recovery.rounded_weights import refuse_untrainable, rounded_weights
    from headprune.surgery import save

    TrainingBudget.of(steps, minutes, None, get_method(method).lr if lr is None else lr, 1)  # refused before the data are read
    if quantise is not None:
        refuse_untrainable(quantise, method)
    for source in filter(None, (model, teacher)):
        refuse_replacing_source(source, output)
    refuse_replacing(output, overwrite)
    place = {} if device == "auto" else trainer_options(chosen_device(device))
    work = output.with_name(f"{output.name}.recovery")  # what a killed one goes on from
    pruned, data = opened(model, task, device=device)
    dense = None if teacher is None else opened_model(teacher, device=device, base=data.base)[0]
    if dense is not None:
        data.check_model(dense)

    def quality(title: str) -> dict[str, float]:
        with nullcontext() if quantise is None else rounded_weights(pruned, quantise):
            return with_bar(title, lambda progress: quality_of(pruned, data, progress))

    before = quality("evaluate the pruned model")
    result = with_bar("recover", lambda progress: recover(
        pruned, data.training(), loss_fn=data.loss, teacher=dense, method=method, steps=steps, minutes=minutes, lr=lr,
        quantise=quantise, seed=seed, output_dir=work, progress=progress, **place,
    ))  # fmt: skip
    result.refuse_diverged(lr)
    after = quality("evaluate the recovered model")
    with_bar("save", lambda progress: save(pruned, output, overwrite=overwrite))
    shutil.rmtree(work)
    better = "higher" if data.higher_is_better else "lower"
    weights = "" if quantise is None else f", {FORMS[quantise]}"
    told = f"{data.headline} ({better} is better{weights}): {before[data.headline]:.4f} → {after[data.headline]:.4f}"
    ends = dict(zip(("first_loss", "last_loss"), result.loss_ends))
    document = {"model": str(output), **asdict(result), **ends, "quantise": quantise, "quality_before": before, "quality": after}
    terminal.show(json, document, str(result), told, f"written to {output}")
