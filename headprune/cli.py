"""The command line: each command is one arrow of the way, over the public API."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headprune.errors import HeadpruneError, InvalidInput, unknown_name

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders here; nothing is ever fetched
app = typer.Typer(
    name="headprune",
    help="Score, choose, cut and recover attention heads: smaller dense transformers that run faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
progress_console = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A model folder, or an embedded model: minilm, stdlib-lm.")]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", help="The data: docstring-retrieval (default for encoders), standard-library-text (for language models)."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML), e.g. recipes/minilm.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. plan.budget.heads=0.3")] = None,
) -> None:
    """Carry out a recipe: score, plan, cut, compensate, evaluate, save. A killed run goes on where it stopped."""
    from headprune.recipe import load_recipe

    carry_out(load_recipe(recipe, overrides or ()))


@app.command("demo")
def demo_command(
    model: Annotated[
        str, typer.Option(help="minilm: a pretrained sentence encoder; stdlib-lm: a decoder, trained first (two minutes, once).")
    ] = "minilm",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
) -> None:
    """The main job on an embedded model: half of its heads go, the gain is measured."""
    from headprune.recipe import parse_recipe
    from headprune.sources import demo_recipe

    content = demo_recipe(model)
    if output:
        content["output"] = str(output)
    carry_out(parse_recipe(content, f"of the {model} demo"))


def carry_out(recipe) -> None:
    from headprune.report.progress import Stages
    from headprune.report.tables import run_tables
    from headprune.run import run as run_recipe

    with logged_to(Path(recipe.output)):
        result = run_recipe(recipe, Stages(progress_console))
    for table in run_tables(result):
        console.print(table)


@app.command()
def score(
    model: ModelArgument,
    task: TaskOption = None,
    criterion: Annotated[str, typer.Option(help="One or several, with commas between; see `headprune criteria`.")] = "fisher",
    normalize: Annotated[str, typer.Option(help="none, layer_l2 or layer_sum.")] = "none",
    portraits: Annotated[bool, typer.Option("--portraits", help="Say what each head attends to.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document in place of tables.")] = False,
    output: OutputOption = Path("scores.json"),
) -> None:
    """Score every head of a model, by several criteria in one pass; say how far they agree and can be trusted."""
    from headprune import scoring
    from headprune.report.score_report import ScoreReport

    names = list(dict.fromkeys(name.strip() for name in criterion.split(",")))
    needs = frozenset().union(*(scoring.get_criterion(name).needs for name in names))
    scoring.check_normalization(normalize)
    dense, data = opened(model, task)
    observed = with_bar(f"score heads by {', '.join(names)}", lambda progress: scoring.observe(
        dense, data.calibration, needs | (scoring.portrait_needs(dense) if portraits else set()), loss_fn=data.loss,
        token_kinds=data.tokenizer, progress=lambda done: progress(done, len(data.calibration)),
    ))  # fmt: skip
    report = ScoreReport.of(observed, names, normalize, portraits)
    written = report.save(output)
    if json:
        console.print_json(data=report.to_json())
    for shown in () if json else (*report.tables(), *(f"written to {path}" for path in written)):
        console.print(shown)
    for warning in report.warnings():
        progress_console.print(f"[yellow]{escape(warning)}[/]", highlight=False, soft_wrap=True)


@app.command()
def criteria() -> None:
    """List the criteria: what each reads, what it costs, where it comes from."""
    from headprune import scoring

    table = Table("criterion", "needs", "cost", "what it is", "source")
    for name, found in scoring.criteria().items():
        table.add_row(name, ", ".join(need.value for need in found.needs) or "nothing", found.cost, found.summary, found.source)
    console.print(table)


@app.command("plan")
def plan_command(
    scores: Annotated[Path, typer.Argument(help="scores.json from `headprune score`.")],
    heads: Annotated[float | None, typer.Option(help="Fraction of the query heads to remove.")] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of the attention parameters to remove.")] = None,
    kv_cache: Annotated[float | None, typer.Option(help="Fraction of the key/value cache to remove.")] = None,
    flops: Annotated[float | None, typer.Option(help="Fraction of the attention FLOPs to remove.")] = None,
    latency: Annotated[float | None, typer.Option(help="Fraction of the model's latency to remove, by --table.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the sequence that FLOPs are counted for.")] = 512,
    table: Annotated[Path | None, typer.Option(help="latency.json from `headprune latency` on this machine.")] = None,
    other_machine: Annotated[bool, typer.Option("--other-machine", help="The plan is for the machine of --table.")] = False,
    allocation: Annotated[str, typer.Option(help="global, uniform or optimal.")] = "global",
    granularity: Annotated[str, typer.Option(help="query_head (ragged groups) or kv_group (whole groups).")] = "query_head",
    min_heads: Annotated[int, typer.Option(help="Query heads that every attention keeps.")] = 1,
    multiple_of: Annotated[int, typer.Option(help="Attentions that lose heads keep a multiple of this.")] = 1,
    protect: Annotated[list[str] | None, typer.Option(help="Attention sites that lose nothing.")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="sensitivity.json; loss curves for --allocation optimal.")] = None,
    output: OutputOption = Path("plan.json"),
) -> None:
    """Choose the heads to keep under a budget."""
    from headprune.evaluation import machines_here
    from headprune.planning import Budget, LatencyTable, Sensitivity, plan
    from headprune.scoring import HeadScores

    measured = None if table is None else LatencyTable.load(table)
    if measured and not other_machine:
        measured.refuse_other_machine(machines_here())
    budget = Budget(heads, params, kv_cache, flops, latency, length, measured)
    chosen = plan(
        HeadScores.load(scores), budget, allocation=allocation, granularity=granularity, min_heads=min_heads,
        multiple_of=multiple_of, protect=protect or (), sensitivity=None if sensitivity is None else Sensitivity.load(sensitivity),
    )  # fmt: skip
    chosen.save(output)
    console.print(chosen)
    console.print(f"written to {output}")


@app.command("latency")
def latency_command(model: ModelArgument, task: TaskOption = None, output: OutputOption = Path("latency.json")) -> None:
    """Time every attention with every number of heads on this machine, for latency budgets."""
    from headprune.evaluation import measure_latency_table

    dense, data = opened(model, task)
    table = with_bar("time attentions", lambda progress: measure_latency_table(dense, data.latency_inputs(), progress=progress))
    table.save(output)
    console.print(f"{table.machine}: batch {table.batch}, {table.length} tokens; the rest of the model {table.rest / 1e6:.2f} ms")
    for key, times in table.attention.items():
        console.print(f"  {key}: {' '.join(f'{time / 1e6:.2f}' for time in times)} ms with 0, 1, 2, ... heads")
    console.print(f"written to {output}")


@app.command("sensitivity")
def sensitivity_command(
    model: ModelArgument,
    scores: Annotated[Path, typer.Argument(help="scores.json: the order in which the heads of a layer go.")],
    task: TaskOption = None,
    output: OutputOption = Path("sensitivity.json"),
) -> None:
    """Which layers tolerate pruning: the loss with 1, 2, 3, ... heads of each attention gone."""
    from headprune.planning import sensitivity
    from headprune.scoring import HeadScores

    dense, data = opened(model, task)
    found = with_bar("measure sensitivity", lambda progress: sensitivity(
        dense, data.calibration, HeadScores.load(scores), loss_fn=data.loss,
        progress=lambda done: progress(done, len(data.calibration)),
    ))  # fmt: skip
    found.save(output)
    console.print(found)
    console.print(f"written to {output}")


@app.command("sweep")
def sweep_command(
    model: ModelArgument,
    scores: Annotated[Path, typer.Argument(help="scores.json from `headprune score`.")],
    budgets: Annotated[str, typer.Option(help="Fractions to remove, with commas between.")] = "0.25,0.5,0.65,0.75",
    quantity: Annotated[str, typer.Option(help="What the fractions are of: heads, params, kv_cache or flops.")] = "heads",
    allocation: Annotated[str, typer.Option(help="global, uniform or optimal.")] = "global",
    task: TaskOption = None,
    output: OutputOption = Path("sweep.json"),
) -> None:
    """Quality and cost over many budgets, from one scoring pass."""
    from headprune.planning import Budget
    from headprune.scoring import HeadScores
    from headprune.sweep import sweep

    chosen = [Budget(**{known_quantity(quantity): fraction}) for fraction in fractions(budgets)]
    ranking = HeadScores.load(scores)
    dense, data = opened(model, task)
    found = with_bar("sweep", lambda progress: sweep(dense, data, ranking, chosen, allocation=allocation, progress=progress))
    found.save(output)
    console.print(found)
    console.print(f"written to {output}")


def known_quantity(name: str) -> str:
    known = ("heads", "params", "kv_cache", "flops")
    if name not in known:
        raise unknown_name("quantity", name, known)
    return name


def fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"budgets {text!r}: expected fractions with commas between, for example 0.25,0.5.") from None


@app.command("prune")
def prune_command(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="plan.json from `headprune plan`.")],
    output: OutputOption,
    task: Annotated[str | None, typer.Option(help="Re-solve the output projections on this task's calibration data.")] = None,
) -> None:
    """Cut the heads that a plan lets go and save the smaller model."""
    from headprune.planning import PruningPlan
    from headprune.surgery import prune, save

    chosen = PruningPlan.load(plan)
    if task is None:
        dense, tokenizer = opened_model(model)
        prune(dense, chosen)
    else:
        dense, data = opened(model, task)
        tokenizer = data.tokenizer
        with_bar("re-solve output projections", lambda progress: prune(
            dense, chosen, data.calibration, forward=data.forward, progress=progress
        ))  # fmt: skip
    save(dense, output, tokenizer=tokenizer)
    console.print(chosen)
    console.print(f"written to {output}")


@app.command("export")
def export_command(
    model: ModelArgument, to: Annotated[str, typer.Option(help="stock, onnx, gguf or vllm.")], output: OutputOption
) -> None:
    """Write a pruned model for another engine; its outputs are checked to stay the same."""
    from headprune.surgery.export import export

    found, tokenizer = opened_model(model)
    console.print(str(with_bar(f"export to {to}", lambda progress: export(found, to, output, tokenizer=tokenizer))))


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
        console.print(with_bar("evaluate", lambda progress: evaluate(found, data, progress=progress)))
    else:
        dense, _ = opened_model(against)
        console.print(with_bar("evaluate", lambda progress: compare(dense, found, data, progress=progress)))


@app.command()
def inspect(model: ModelArgument) -> None:
    """The attention sites and head maps of a model folder."""
    from headprune.report.tables import sites_table
    from headprune.sources import model_folder, opening
    from headprune.surgery.checkpoint import skeleton

    found = with_bar(opening(model), lambda progress: skeleton(model_folder(model, progress)))
    console.print(sites_table(found))


@app.command()
def doctor() -> None:
    """Versions, devices, and which backend runs each operator and why."""
    from headprune.report.doctor import doctor_tables

    for table in doctor_tables():
        console.print(table)


def opened(model: str, task: str | None):
    """(model, task), the task by its name or the one for such models."""
    from headprune.evaluation.tasks import build_task, check_task
    from headprune.sources import default_task

    if task is not None:
        check_task(task)
    found, tokenizer = opened_model(model)
    data = build_task(task or default_task(model, found), tokenizer)
    data.check_model(found)
    return found, data


def opened_model(model: str):
    from headprune.sources import open_model, opening

    return with_bar(opening(model), lambda progress: open_model(model, progress))


def with_bar(title: str, work):
    from headprune.report.progress import Stages

    with Stages(progress_console).stage(title) as progress:
        return work(progress)


@contextlib.contextmanager
def logged_to(folder: Path):
    """Keeps what headprune logs in `folder`/log.txt, once the run has made the folder its own."""
    handler = logging.FileHandler(folder / "log.txt", delay=True)
    handler.addFilter(lambda record: folder.is_dir())  # a model may be trained before the run writes anything
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("headprune")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Runs the command line: errors that the user can put right are one line on stderr and exit code 2."""
    try:
        quiet_transformers()
        app()
    except HeadpruneError as error:
        progress_console.print(f"[bold red]error:[/] {one_line(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        progress_console.print("stopped; the same command goes on from here")
        sys.exit(130)


def one_line(error: Exception) -> str:
    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
