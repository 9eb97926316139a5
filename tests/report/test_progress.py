"""What is told of the stages of a run."""

from rich.console import Console

from headprune.report.progress import Stages


def test_a_folder_with_brackets_keeps_its_name():
    """Rich takes [final] for a style, and [/y] for the end of one that never began: an error when the run was done."""
    console = Console(width=80, record=True, quiet=False)
    stages = Stages(console)
    for title in ("load ./llama[final]", "load x[/y]"):
        with stages.stage(title):
            pass
    console.print(stages)
    told = console.export_text()
    assert told.count("load ./llama[final]") == told.count("load x[/y]") == 2
