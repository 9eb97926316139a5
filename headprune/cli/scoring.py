"""Commands that measure heads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from headprune.cli import completion, terminal
from headprune.cli.app import app
from headprune.cli.inputs import (
    BitsOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    OutputOption,
    StreamedOption,
    TaskOption,
    opened,
    writable_file,
)
from headprune.cli.terminal import with_bar


@app.command(epilog="Example: headprune score minilm --criterion fisher,entropy --portraits")
def score(
    model: ModelArgument,
    task: TaskOption = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="One or several, with commas between; see `headprune criteria`.",
            autocompletion=completion.some_of(completion.criteria),
        ),
    ] = "fisher",
    normalize: Annotated[
        str, typer.Option(help="none, layer_l2 or layer_sum.", autocompletion=completion.one_of(completion.normalizations))
    ] = "none",
    portraits: Annotated[bool, typer.Option("--portraits", help="Say what each head attends to.")] = False,
    keep_unreached: Annotated[
        bool, typer.Option("--keep-unreached", help="Leave attentions that the data does not run through all of their heads.")
    ] = False,
    streamed: StreamedOption = False,
    bits: BitsOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
    output: OutputOption = Path("scores.json"),
) -> None:
    """Score every head of a model, by several criteria in one pass; say how far they agree and can be trusted."""
    from headprune import scoring
    from headprune.models.identity import ModelIdentity
    from headprune.report.score_report import ScoreReport

    names = list(dict.fromkeys(name.strip() for name in criterion.split(",")))
    needs = frozenset().union(*(scoring.get_criterion(name).needs for name in names))
    scoring.check_normalization(normalize)
    dense, data = opened(model, task, streamed, device, bits)
    states = output.with_name(f".{output.name}.states") if streamed else None
    observed = with_bar(f"score heads by {', '.join(names)}", lambda progress: scoring.observe(
        dense, data.calibration, needs | (scoring.portrait_needs(dense) if portraits else set()), loss_fn=data.loss,
        token_kinds=data.token_kinds(), progress=lambda done: progress(done, len(data.calibration)), checkpoint=states,
        unreached="keep" if keep_unreached else "error",
    ))  # fmt: skip
    report = ScoreReport.of(observed, names, normalize, portraits, ModelIdentity.of(dense))
    written = report.save(output)
    if states is not None:
        shutil.rmtree(states)
    terminal.show(json, report.to_json(), *report.tables(), *(f"written to {path}" for path in written))
    for warning in report.warnings():
        terminal.progress_console.print(f"[yellow]{escape(warning)}[/]", highlight=False, soft_wrap=True)


@app.command(epilog="Example: headprune criteria --json")
def criteria(json: JsonOption = False) -> None:
    """List the criteria: what each reads, what it costs, where it comes from."""
    from headprune import scoring

    # Names are to be typed again: however narrow the terminal is, none is cut short.
    table = Table(Column("criterion", no_wrap=True), Column("needs", overflow="fold"), "cost", "what it is", "source")
    for name, found in scoring.criteria().items():
        table.add_row(name, ", ".join(need.value for need in found.needs) or "nothing", found.cost, found.summary, found.source)
    terminal.show(json, terminal.rows_of(table), table)


@app.command("tasks", epilog="Example: headprune tasks")
def tasks_command(json: JsonOption = False) -> None:
    """List the tasks: the data that heads are scored and models are measured on, your own too, with their options and defaults."""
    from headprune.evaluation.tasks import task_defaults, task_options, tasks

    table = Table("task", "what it is", "options")
    for name, found in tasks().items():
        defaults = task_defaults(found)
        options = [f"{option}={defaults[option]}" if option in defaults else option for option in task_options(found)]
        table.add_row(name, completion.first_line(found), ", ".join(options))
    terminal.show(json, terminal.rows_of(table), table)


@app.command("sensitivity", epilog="Example: headprune sensitivity minilm scores.json")
def sensitivity_command(
    model: ModelArgument,
    scores: Annotated[Path, typer.Argument(help="scores.json: the order in which the heads of a layer go.")],
    task: TaskOption = None,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Measure on so many calibration batches, the first ones; by default on all.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Also the curves as a table, one point a line, for a plot.", callback=writable_file)
    ] = None,
    device: DeviceOption = "auto",
    output: OutputOption = Path("sensitivity.json"),
    json: JsonOption = False,
) -> None:
    """Which layers tolerate pruning: the loss with 1, 2, 3, ... heads of each attention gone, and with each head alone gone."""
    from headprune.planning import sensitivity
    from headprune.scoring import HeadScores

    order = HeadScores.load(scores)
    dense, data = opened(model, task, device=device)
    read = data.calibration[:batches]
    found = with_bar("measure sensitivity", lambda progress: sensitivity(
        dense, read, order, loss_fn=data.loss, progress=lambda done: progress(done, len(read)),
    ))  # fmt: skip
    found.save(output)
    if csv is not None:
        found.save_csv(csv)
    terminal.show_file(json, output, found, *([] if csv is None else [f"written to {csv}"]))
