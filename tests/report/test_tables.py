import io

from reported_run import batches
from rich.console import Console
from tiny_models import llama

from headprune.planning import Budget, plan, sensitivity
from headprune.report.tables import check_rows, sites_table
from headprune.scoring import score
from headprune.surgery import cut, diff


def test_checks_are_shown_whatever_they_found():
    rows = check_rows({"reload": 0.0, "generates_as_gated": True, "another": False, "counted": 3})
    assert [found for _, found in rows] == ["0.0e+00", "yes", "no", "3"]
    assert rows[0][0].startswith("loaded from disk")
    assert rows[2][0] == "another"


def test_a_terminal_of_80_columns_breaks_no_word():
    model, narrow = llama(), Console(file=io.StringIO(), width=80)
    scores = score(model, batches(), "fisher")
    chosen, pruned = plan(scores, Budget(heads=0.5)), llama()
    cut(pruned, chosen)
    for one in (scores, chosen, sensitivity(model, batches(), scores), sites_table(pruned), diff(model, pruned)):
        narrow.print(one)
    words = set(narrow.file.getvalue().translate(dict.fromkeys(map(ord, "│┃┡┏└"), " ")).split())
    assert {"self_attn", "attention", "parameters"} <= {word.rpartition(".")[2] for word in words}
    assert not {word for word in words if word.endswith(("_a", "_att", "_atten")) or word in ("ttn", "attn", "n", "m", "rs")}
