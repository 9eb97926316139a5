"""The command that compares head pruning with other ways to make a model smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headprune.cli import completion, terminal
from headprune.cli.app import app
from headprune.cli.inputs import DeviceOption, JsonOption, ModelArgument, TaskOption, asked_first, opened
from headprune.cli.terminal import with_bar
from headprune.errors import InvalidInput
from headprune.files import refuse_unwritable


def refuse_no_markdown(path: Path) -> None:
    """Also because the rows of NAME.md and of NAME.json would be kept in one folder."""
    refuse_unwritable(path, file=True)
    if path.suffix != ".md":
        raise InvalidInput(f"--output {path}: the table is written as Markdown; give a name that ends in .md (--json prints JSON).")


@app.command("compare", epilog="Example: headprune compare minilm --heads 0.5 --methods heads,unstructured,channels -o table.md")
def compare_command(
    model: ModelArgument,
    task: TaskOption = None,
    heads: Annotated[
        float, typer.Option(help="Fraction of the query heads to remove; the others remove as many parameters.")
    ] = 0.5,
    plan: Annotated[Path | None, typer.Option(help="plan.json: the heads to keep, in place of --heads.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between; by default all; an unknown one lists them.",
            autocompletion=completion.some_of(completion.compared_methods),
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="Of head pruning; by default the embedded model's own, or fisher.",
            autocompletion=completion.one_of(completion.criteria),
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=0, help="Plans to try, pruned and compensated; 0: by scores alone.")] = 10,
    steps: Annotated[int, typer.Option(min=0, help="Of the fine-tune that all go through; 0: none.")] = 50,
    lr: Annotated[float | None, typer.Option(help="Its peak learning rate.")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Timed forward passes of each, dense and compressed in turn; 0: none.")] = 10,
    seed: Annotated[int, typer.Option(help="The order of the batches.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The table, as Markdown: NAME.md.", callback=asked_first(refuse_no_markdown))
    ] = Path("comparison.md"),
    folder: Annotated[
        Path | None, typer.Option(help="Keeps each method's row as it is done; by default NAME.rows beside the table.")
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Head pruning against other pruning, sparsity, distillation and quantisation, measured on the model. A killed one goes on."""
    from headprune.comparison import compare_methods
    from headprune.comparison.method import chosen_methods
    from headprune.embedded import EMBEDDED
    from headprune.files import write_text
    from headprune.planning import PruningPlan

    rows = folder or output.with_name(f"{output.stem}.rows")
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    chosen_methods(names)
    chosen = None if plan is None else PruningPlan.load(plan)
    own = EMBEDDED.get(model)
    dense, data = opened(model, task, device=device)
    found = with_bar("compare methods", lambda progress: compare_methods(
        dense, data, heads=heads, plan=chosen, methods=names, criterion=criterion or (own.criterion if own else "fisher"),
        trials=trials, feed_forward=bool(own and own.feed_forward), steps=steps, lr=lr, repeats=repeats, seed=seed,
        folder=rows, progress=progress,
    ))  # fmt: skip
    write_text(output, found.to_markdown())
    terminal.show(json, found.to_json(), found, f"written to {output}")
