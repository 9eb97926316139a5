"""Commands that measure models and this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from headprune.cli import terminal
from headprune.cli.app import app
from headprune.cli.inputs import JsonOption, ModelArgument, TaskOption, opened, opened_model
from headprune.cli.terminal import with_bar


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    task: TaskOption = None,
    against: Annotated[str | None, typer.Option(help="The dense model, measured in the same run.")] = None,
) -> None:
    """Quality and cost of a model, alone or beside its dense original."""
    from headprune.evaluation import compare, evaluate

    found, data = opened(model, task)
    if against is None:
        terminal.console.print(with_bar("evaluate", lambda progress: evaluate(found, data, progress=progress)))
    else:
        dense, _ = opened_model(against)
        terminal.console.print(with_bar("evaluate", lambda progress: compare(dense, found, data, progress=progress)))


@app.command()
def doctor() -> None:
    """Versions, devices, and which backend runs each operator and why."""
    from headprune.report.doctor import doctor_tables

    for table in doctor_tables():
        terminal.console.print(table)


@app.command("estimate")
def estimate_command(
    model: Annotated[str, typer.Argument(help="A model folder; its config.json is enough.")],
    heads: Annotated[float | None, typer.Option(help="Fraction of the query heads to remove.")] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of the attention parameters to remove.")] = None,
    kv_cache: Annotated[float | None, typer.Option(help="Fraction of the key/value cache to remove.")] = None,
    flops: Annotated[float | None, typer.Option(help="Fraction of the attention FLOPs to remove.")] = None,
    device: Annotated[str, typer.Option(help="cpu (this machine), a100-80gb, h100, h200, l4 or l40s.")] = "cpu",
    tokens: Annotated[int, typer.Option(help="Of calibration.")] = 65536,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    length: Annotated[int, typer.Option(help="Of a sequence, in tokens.")] = 2048,
    granularity: Annotated[str, typer.Option(help="query_head or kv_group.")] = "query_head",
    json: JsonOption = False,
) -> None:
    """What a model costs before and after pruning, and what scoring it takes; from its config alone."""
    from headprune.evaluation import estimate
    from headprune.planning import Budget
    from headprune.sources import model_folder

    budget = Budget(heads, params, kv_cache, flops, sequence_length=length)
    found = estimate(model_folder(model), budget, device=device, tokens=tokens, batch=batch, length=length, granularity=granularity)
    if json:
        terminal.console.print_json(data=found.to_json())
    else:
        terminal.console.print(found)
        terminal.console.print(found.scoring())
