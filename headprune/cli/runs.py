"""Commands that carry out a whole recipe."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprune.cli import terminal
from headprune.cli.app import app
from headprune.cli.completion import models, one_of
from headprune.cli.inputs import JsonOption, writable_file, writable_folder
from headprune.cli.terminal import with_bar

if TYPE_CHECKING:  # commands import what they need when they run
    from headprune.recipe import Recipe


@app.command(epilog="Example: headprune run recipes/minilm.yaml plan.budget.heads=0.3 output=runs/third")
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML), e.g. recipes/minilm.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. plan.budget.heads=0.3")] = None,
    json: JsonOption = False,
) -> None:
    """Carry out a recipe: score, plan, cut, compensate, evaluate, save. A killed run goes on where it stopped."""
    from headprune.recipe import load_recipe

    carry_out(load_recipe(recipe, overrides or ()), json)


@app.command("demo", epilog="Example: headprune demo --model stdlib-lm")
def demo_command(
    model: Annotated[
        str,
        typer.Option(
            help="minilm: a pretrained sentence encoder; stdlib-lm: a decoder, trained first (some minutes, once).",
            autocompletion=one_of(models),
        ),
    ] = "minilm",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run; by default runs/ and its name.", callback=writable_folder),
    ] = None,
    json: JsonOption = False,
) -> None:
    """The main job on an embedded model: half of its heads go, the gain is measured."""
    from headprune.recipe import parse_recipe
    from headprune.sources import demo_recipe

    content = demo_recipe(model)
    if output:
        content["output"] = str(output)
    carry_out(parse_recipe(content, f"of the {model} demo"), json)


@app.command("report", epilog="Example: headprune report runs/minilm --figures plots")
def report_command(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, or any with scores*.json or plan.json of one model.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; by default report.html in the folder.", callback=writable_file)
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write every plot as PNG and SVG to this folder.", callback=writable_folder)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a run's report: one HTML file in which heads can be kept or dropped, and figures for papers."""
    from headprune.report.figures import figures as draw
    from headprune.report.web_page import report

    page = with_bar("write the report", lambda progress: report(folder, output))
    drawn = [] if figures is None else with_bar("draw figures", lambda progress: draw(folder, figures))
    shown = [f"written to {page}", *([f"{len(drawn)} figures in {figures}"] if drawn else [])]
    terminal.show(json, {"report": str(page), "figures": [str(path) for path in drawn]}, *shown)


def carry_out(recipe: Recipe, json: bool) -> None:
    from headprune.report.progress import Stages
    from headprune.report.tables import run_tables
    from headprune.run import run as run_recipe

    with logged_to(Path(recipe.output)):
        result = run_recipe(recipe, Stages(terminal.progress_console))
    terminal.show(json, result.to_json(), *run_tables(result))


@contextlib.contextmanager
def logged_to(folder: Path) -> Iterator[None]:
    """Keeps what headprune logs in `folder`/log.txt, once the run has made the folder its own."""
    handler = logging.FileHandler(folder / "log.txt", delay=True, encoding="utf-8", errors="backslashreplace")
    handler.addFilter(lambda record: (folder / "recipe.yaml").exists())  # a model may be trained before the run writes anything
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("headprune")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
