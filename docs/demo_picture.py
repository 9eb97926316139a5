"""Draws what `make demo` prints: `python docs/demo_picture.py` carries the recipe out anew and writes docs/demo.svg."""

import contextlib
import tempfile
from pathlib import Path

from rich.console import Console

from headprune.cli import terminal
from headprune.cli.runs import carry_out
from headprune.recipe import load_recipe

FOLDER = Path(__file__).resolve().parent
COLUMNS = 80


def main() -> None:
    recipe = load_recipe(FOLDER.parent / "recipes" / "minilm.yaml")
    terminal.console = Console(record=True, width=COLUMNS)
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
        carry_out(recipe, json=False)
    terminal.console.save_svg(str(FOLDER / "demo.svg"), title="make demo")


if __name__ == "__main__":
    main()
