"""Names of attentions in tables."""

import io

from rich.console import Console
from rich.table import Table

from headprune.models.name_cell import NameCell


def shown(width: int) -> list[str]:
    table = Table("attention", "heads", box=None, show_header=False)
    table.add_row(NameCell("decoder.layers.11.self_attn"), "8")
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_a_name_is_broken_behind_its_dots_and_only_where_it_must():
    assert shown(80) == [["decoder.layers.11.self_attn", "8"]]
    assert shown(25) == [["decoder.layers.11.", "8"], ["self_attn"]]
    assert shown(16) == [["decoder.", "8"], ["layers.11."], ["self_attn"]]


def test_nothing_of_a_name_is_lost_where_a_part_is_wider_than_the_table():
    assert "".join(line[0] for line in shown(8)) == "decoder.layers.11.self_attn"
