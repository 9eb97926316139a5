"""Commands that choose heads under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprune.cli import completion, terminal
from headprune.cli.app import app
from headprune.cli.completion import one_of
from headprune.cli.inputs import (
    AllocationOption,
    DeviceOption,
    FlopsOption,
    HeadsOption,
    JsonOption,
    KvCacheOption,
    ModelArgument,
    OutputOption,
    ParamsOption,
    TaskOption,
    opened,
    refuse_budgets,
    refuse_unread,
)
from headprune.cli.terminal import with_bar
from headprune.errors import InvalidInput, unknown_name

if TYPE_CHECKING:  # commands import what they need when they run
    from headprune.planning import Budget, PruningPlan
    from headprune.scoring import HeadScores

QUANTITIES = ("heads", "params", "kv_cache", "flops")  # of sweeps


@app.command("plan", epilog="Example: headprune plan scores.json --heads 0.5 --allocation uniform")
def plan_command(
    scores: Annotated[Path, typer.Argument(help="scores.json from `headprune score`.")],
    heads: HeadsOption = None,
    params: ParamsOption = None,
    kv_cache: KvCacheOption = None,
    flops: FlopsOption = None,
    latency: Annotated[float | None, typer.Option(help="Fraction of the model's latency to remove, by --table.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the sequence that FLOPs are counted for.")] = 512,
    table: Annotated[Path | None, typer.Option(help="latency.json from `headprune latency` on this machine.")] = None,
    other_machine: Annotated[bool, typer.Option("--other-machine", help="The plan is for the machine of --table.")] = False,
    target: Annotated[
        str,
        typer.Option(
            help="Where it will run: headprune, llama.cpp, vllm or stock; sets that engine's constraints.",
            autocompletion=one_of(completion.engines),
        ),
    ] = "headprune",
    allocation: AllocationOption = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="query_head (ragged groups) or kv_group (whole groups).",
            show_default="kv_group with --kv-cache, else query_head",
            autocompletion=one_of(completion.granularities),
        ),
    ] = None,
    min_heads: Annotated[int, typer.Option(help="Query heads that every attention keeps.")] = 1,
    multiple_of: Annotated[int, typer.Option(help="Attentions that lose heads keep a multiple of this.")] = 1,
    protect: Annotated[list[str] | None, typer.Option(help="An attention site that loses nothing; may be repeated.")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="sensitivity.json; loss curves for --allocation optimal.")] = None,
    trials: Annotated[int, typer.Option(help="Plans to try on --model, pruned and compensated; 0: by scores alone.", min=0)] = 0,
    model: Annotated[str | None, typer.Option(help="The model that was scored, for --trials.")] = None,
    task: TaskOption = None,
    device: Annotated[str | None, typer.Option(help="Where --model runs.", show_default="auto")] = None,
    output: OutputOption = Path("plan.json"),
    json: JsonOption = False,
) -> None:
    """Choose the heads to keep under a budget."""
    from headprune.evaluation import machines_here
    from headprune.planning import Budget, LatencyTable, Sensitivity, plan
    from headprune.scoring import HeadScores

    refuse_budgets(heads=heads, params=params, kv_cache=kv_cache, flops=flops, latency=latency)
    refuse_unread("--trials", trials > 0, model=model, task=task, device=device)
    refuse_unread("--latency", latency is not None, table=table)
    measured = None if table is None else LatencyTable.load(table)
    if measured and not other_machine:
        measured.refuse_other_machine(machines_here())
    budget = Budget(heads, params, kv_cache, flops, latency, length, measured)
    ranking = HeadScores.load(scores)
    options: dict[str, Any] = {
        "allocation": allocation, "granularity": granularity, "min_heads": min_heads, "multiple_of": multiple_of,
        "protect": protect or (), "sensitivity": None if sensitivity is None else Sensitivity.load(sensitivity), "target": target,
    }  # fmt: skip
    if trials:
        chosen = tried(model, task, device or "auto", ranking, budget, trials, options)
    else:
        chosen = with_bar("plan", lambda progress: plan(ranking, budget, **options))
    chosen.save(output)
    terminal.show_file(json, output, chosen)


def tried(
    model: str | None, task: str | None, device: str, scores: HeadScores, budget: Budget, trials: int, options: dict[str, Any]
) -> PruningPlan:
    """The best of the plans that are tried on the model."""
    from headprune.surgery import search_plan

    if model is None:
        raise InvalidInput("--trials prunes and compensates the model that was scored; name it with --model.")
    dense, data = opened(model, task, device=device)
    return with_bar(
        "try plans, pruned and compensated",
        lambda progress: search_plan(
            dense, scores, budget, data.calibration, trials=trials, forward=data.readout, progress=progress, **options
        ),
    ).plan


@app.command("latency", epilog="Example: headprune latency minilm -o latency.json")
def latency_command(
    model: ModelArgument,
    task: TaskOption = None,
    device: DeviceOption = "auto",
    output: OutputOption = Path("latency.json"),
    json: JsonOption = False,
) -> None:
    """Time every attention with every number of heads on this machine, for latency budgets."""
    from headprune.evaluation import measure_latency_table

    dense, data = opened(model, task, device=device)
    table = with_bar("time attentions", lambda progress: measure_latency_table(dense, data.latency_inputs(), progress=progress))
    table.save(output)
    head = f"{table.machine}: batch {table.batch}, {table.length} tokens; the rest of the model {table.rest / 1e6:.2f} ms"
    lines = (
        f"  {key}: {' '.join(f'{time / 1e6:.2f}' for time in times)} ms with 0, 1, 2, ... heads"
        for key, times in table.attention.items()
    )
    terminal.show_file(json, output, head, *lines)


@app.command("sweep", epilog="Example: headprune sweep minilm scores.json --budgets 0.25,0.5")
def sweep_command(
    model: ModelArgument,
    scores: Annotated[Path, typer.Argument(help="scores.json from `headprune score`.")],
    budgets: Annotated[str, typer.Option(help="Fractions to remove, with commas between.")] = "0.25,0.5,0.65,0.75",
    quantity: Annotated[
        str,
        typer.Option(
            help="What the fractions are of: heads, params, kv_cache or flops.", autocompletion=one_of(lambda: QUANTITIES)
        ),
    ] = "heads",
    allocation: AllocationOption = None,
    task: TaskOption = None,
    device: DeviceOption = "auto",
    output: OutputOption = Path("sweep.json"),
    json: JsonOption = False,
) -> None:
    """Quality and cost over many budgets, from one scoring pass."""
    from headprune.planning import Budget
    from headprune.scoring import HeadScores
    from headprune.sweep import sweep

    chosen = [Budget.of({known_quantity(quantity): fraction}) for fraction in fractions(budgets)]
    ranking = HeadScores.load(scores)
    dense, data = opened(model, task, device=device)
    found = with_bar("sweep", lambda progress: sweep(dense, data, ranking, chosen, allocation=allocation, progress=progress))
    found.save(output)
    terminal.show_file(json, output, found)


def known_quantity(name: str) -> str:
    if name not in QUANTITIES:
        raise unknown_name("quantity", name, QUANTITIES)
    return name


def fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"budgets {text!r}: expected fractions with commas between, for example 0.25,0.5.") from None
