"""One Python file out of a module of this package and those that it imports: code that runs where headprune is not."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType


def one_file(module: ModuleType) -> str:
    """The source of `module`, and in place of each `from headprune.x import y` at its top all of x. Their names must differ."""
    imports: dict[str, None] = {}  # each once
    bodies: dict[str, str] = {}
    inline(module, imports, bodies)
    future = [line for line in imports if line.startswith("from __future__")]
    others = [line for line in imports if line not in future]
    return "\n".join([f'"""{module.__doc__}"""', "", *future, "", *others, "", *bodies.values()])


def inline(module: ModuleType, imports: dict[str, None], bodies: dict[str, str]) -> None:
    """Adds `module`'s imports from elsewhere and the rest of its source, behind what it imports from this package."""
    source = inspect.getsource(module)
    top = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("headprune."):
            if node.module not in bodies:
                inline(importlib.import_module(str(node.module)), imports, bodies)
        else:
            imports[ast.unparse(node)] = None
    last = max(node.end_lineno or 0 for node in top)
    bodies[module.__name__] = "\n".join(source.split("\n")[last:])
