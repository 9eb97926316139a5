"""Commands that measure models and this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprune.cli import completion, terminal
from headprune.cli.app import app
from headprune.cli.inputs import (
    DeviceOption,
    FlopsOption,
    HeadsOption,
    JsonOption,
    KvCacheOption,
    ModelArgument,
    ParamsOption,
    TaskOption,
    opened,
    opened_model,
    refuse_budgets,
    refuse_unread,
    writable_file,
)
from headprune.cli.terminal import with_bar
from headprune.errors import InvalidInput

if TYPE_CHECKING:  # commands import what they need when they run
    from torch import nn
    from transformers import PreTrainedModel

    from headprune.evaluation import Comparison, Evaluation
    from headprune.evaluation.data import EvaluationData


@app.command("evaluate", epilog="Example: headprune evaluate ./pruned --against ./dense --text wiki.txt --window 2048")
def evaluate_command(
    model: ModelArgument,
    task: TaskOption = None,
    text: Annotated[
        str | None,
        typer.Option(help="A UTF-8 file to measure perplexity on, in place of a task; or rows of the Hub, owner/name:split."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window of --text.", show_default="512")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows of --text; by default they do not overlap.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, with commas between, in place of a task.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task of --lm-eval; by default all.")] = None,
    against: Annotated[str | None, typer.Option(help="The dense model, measured in the same run.")] = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4: of the model with its weights rounded so, by torchao.",
            autocompletion=completion.one_of(completion.forms),
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed forward passes of each model.")] = 30,
    trace: Annotated[
        Path | None, typer.Option(help="Also write a Chrome trace of forward passes to this file.", callback=writable_file)
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Quality and cost of a model, alone or beside its dense original (in turn, with intervals of the differences)."""
    from headprune.evaluation import compare, evaluate, write_trace
    from headprune.recovery.quantise import quantise as quantise_weights
    from headprune.recovery.quantise import refuse_unknown_form

    if quantise is not None:
        refuse_unknown_form(quantise)
    refuse_unread("--text", text is not None, window=window, stride=stride)
    refuse_unread("--lm-eval", lm_eval is not None, limit=limit)
    found, data = opened_for_evaluation(model, task, text, lm_eval, device, window=window, stride=stride, limit=limit)
    if quantise is not None:
        terminal.progress_console.print(str(quantise_weights(found, quantise)), markup=False, soft_wrap=True)
    models: dict[str, nn.Module] = {"model": found}
    result: Evaluation | Comparison
    if against is None:
        result = with_bar("evaluate", lambda progress: evaluate(found, data, repeats=repeats, progress=progress))
    else:
        dense = opened_model(against, device=device, base=data.base)[0]
        data.check_model(dense)
        models = {"dense": dense, "pruned": found}
        result = with_bar("evaluate", lambda progress: compare(dense, found, data, repeats=repeats, progress=progress))
    terminal.show(json, asdict(result), result)
    if trace is not None:
        with_bar("trace", lambda progress: write_trace(models, data.latency_inputs(), trace))
        terminal.progress_console.print(
            f"trace written to {trace}; open it in ui.perfetto.dev or chrome://tracing", markup=False, soft_wrap=True
        )


def opened_for_evaluation(
    model: str, task: str | None, text: str | None, lm_eval: str | None, device: str, **options: Any
) -> tuple[PreTrainedModel, EvaluationData]:
    """(model, evaluation data): of a text, of tasks of lm-evaluation-harness, or of one of headprune's tasks."""
    from headprune.evaluation import LanguageModelHarness, Perplexity
    from headprune.evaluation.tasks.rows import read_texts
    from headprune.evaluation.tasks.task import refuse_other_tokenizer

    given = [name for name, value in (("--task", task), ("--text", text), ("--lm-eval", lm_eval)) if value is not None]
    if len(given) > 1:
        raise InvalidInput(f"{' and '.join(given)} were given; a model is evaluated on one of them at a time.")
    if text is None and lm_eval is None:
        return opened(model, task, device=device)
    found, tokenizer = opened_model(model, device=device)
    refuse_other_tokenizer(given[0], "text", tokenizer)
    if lm_eval is not None:
        return found, LanguageModelHarness([name.strip() for name in lm_eval.split(",")], tokenizer, limit=options["limit"])
    assert text is not None  # one of the three was given
    data = with_bar(f"read {text}", lambda progress: Perplexity(
        read_texts(text, "text"), tokenizer, window=512 if options["window"] is None else options["window"],
        stride=options["stride"],
    ))  # fmt: skip
    data.check_model(found)
    return found, data


@app.command(epilog="Example: headprune doctor")
def doctor(json: JsonOption = False) -> None:
    """Versions, devices, and which backend runs each operator and why."""
    from headprune.report.doctor import doctor_tables

    tables = with_bar("look at this machine", lambda progress: doctor_tables())
    terminal.show(json, {table.title: terminal.rows_of(table) for table in tables}, *tables)


@app.command("estimate", epilog="Example: headprune estimate ./llama --heads 0.5 --device h100")
def estimate_command(
    model: Annotated[str, typer.Argument(help="A model folder; its config.json is enough.")],
    heads: HeadsOption = None,
    params: ParamsOption = None,
    kv_cache: KvCacheOption = None,
    flops: FlopsOption = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu (this machine), a100-80gb, h100, h200, l4 or l40s.", autocompletion=completion.one_of(completion.devices)
        ),
    ] = "cpu",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score on.")] = 65536,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 4,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence; default 2048, or as many as the model takes.")
    ] = None,
    decoder_length: Annotated[
        int | None, typer.Option(min=1, help="Of an encoder-decoder: tokens of its decoder; default as many, or as it takes.")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="query_head or kv_group.",
            show_default="kv_group with --kv-cache, else query_head",
            autocompletion=completion.one_of(completion.granularities),
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """What a model costs before and after pruning, and what scoring it takes; from its config alone."""
    from headprune.evaluation import estimate
    from headprune.planning import Budget
    from headprune.sources import model_folder

    refuse_budgets(heads=heads, params=params, kv_cache=kv_cache, flops=flops)
    budget = Budget(heads, params, kv_cache, flops, sequence_length=length or Budget.sequence_length)
    found = with_bar(f"estimate for {device}", lambda progress: estimate(
        model_folder(model, progress, weights=False), budget, device=device, tokens=tokens, batch=batch, length=length,
        decoder_length=decoder_length, granularity=granularity,
    ))  # fmt: skip
    terminal.show(json, found.to_json(), found, found.scoring())
