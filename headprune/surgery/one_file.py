"""One Python file out of a module of this package and those that it imports: code that runs where headprune is not."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from types import ModuleType

# (module, "") for `import module`, (module, name) for `from module import name`, as they are written, with " as y".
Imports = set[tuple[str, str]]


def one_file(module: ModuleType) -> str:
    """The source of `module`, and in place of each `from headprune.x import y` at its top all of x. Their names must differ."""
    imports: Imports = set()
    bodies: dict[str, str] = {}
    inline(module, imports, bodies)
    future = {found for found in imports if found[0] == "__future__"}
    standard = {found for found in imports - future if found[0].partition(".")[0] in sys.stdlib_module_names}
    blocks = [written(group) for group in (future, standard, imports - future - standard)]
    return "\n\n".join([f'"""{module.__doc__}"""', *blocks, *bodies.values()])


def inline(module: ModuleType, imports: Imports, bodies: dict[str, str]) -> None:
    """Adds `module`'s imports from elsewhere and the rest of its source, behind what it imports from this package."""
    source = inspect.getsource(module)
    top = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top:
        origin = str(node.module) if isinstance(node, ast.ImportFrom) else ""
        if not origin.startswith("headprune."):
            names = [ast.unparse(alias) for alias in node.names]
            imports |= {(origin, name) if origin else (name, "") for name in names}
        elif origin not in bodies:
            inline(importlib.import_module(origin), imports, bodies)
    last = max(node.end_lineno or 0 for node in top)
    bodies[module.__name__] = "\n".join(source.split("\n")[last:]).rstrip() + "\n"


def written(imports: Imports) -> str:
    lines = sorted(f"import {origin}" for origin, name in imports if not name)
    named: dict[str, list[str]] = {}
    for origin, name in sorted(imports):
        if name:
            named.setdefault(origin, []).append(name)
    return "\n".join([*lines, *(f"from {origin} import {', '.join(names)}" for origin, names in named.items())])
