"""The code that goes into folders is one file that needs nothing of this package."""

import ast
from collections import Counter

from headprune.surgery import modeling_headprune
from headprune.surgery.one_file import one_file

STATEMENTS = ast.parse(one_file(modeling_headprune)).body


def test_nothing_is_imported_from_this_package():
    imports = [node for node in STATEMENTS if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or alias.name for node in imports for alias in node.names]
    assert {name.partition(".")[0] for name in names} & {"torch", "transformers", "headprune"} == {"torch", "transformers"}


def test_no_name_is_given_twice():
    imported = [
        alias.asname or alias.name for node in STATEMENTS if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    ]
    defined = [node.name for node in STATEMENTS if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assigned = [target.id for node in STATEMENTS if isinstance(node, ast.Assign) for target in node.targets]
    assert {"Emptied", "behave", "pruned_class", "BIASES"} <= {*defined, *assigned}
    assert [name for name, count in Counter(imported + defined + assigned).items() if count > 1] == []
