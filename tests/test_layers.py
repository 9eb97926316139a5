"""The import directions of DESIGN.md: every layer of headprune imports only what lies below it."""

import ast
from pathlib import Path

import headprune

PACKAGE = Path(headprune.__file__).parent
# From the top down; the modules of one row may import each other.
LAYERS = [
    {"__init__", "__main__"},
    {"cli"},
    {"api"},
    {"run", "run_inputs", "run_recovery", "run_schedule", "run_streamed", "run_values", "sources", "embedded", "demo"},
    {"report"},
    {"sweep"},
    {"recipe", "recipe_yaml"},
    {"comparison"},
    {"schedules"},
    {"recovery"},
    {"evaluation", "compat"},
    {"surgery"},
    {"planning"},
    {"scoring"},
    {"models"},
    {"attention_interface"},
    {"nn"},
    {"ops"},
    {"kernels"},
    {"head_map", "settings"},
    {"drafts", "files", "version", "arguments", "processor", "hub", "kv_sharing", "model_folder", "starting", "when_imported"},
    {"errors"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    """The first part below headprune of everything that `path` imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "headprune" else [node.module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("headprune.")}
    return found & set(RANK)


def test_every_module_belongs_to_a_layer():
    assert {part for _, part in modules()} <= set(RANK)


def test_imports_only_point_downwards():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for path, part in modules()
        for target in imported_parts(path)
        if target != part and RANK[target] < RANK[part]
    ]
    assert wrong == []


def test_kernels_know_nothing_of_models():
    root = PACKAGE.parent / "kernels" / "triton"
    folder = root if root.is_dir() else PACKAGE / "kernels"
    allowed = {"kernels", "head_map", "errors"}
    wrong = {str(path): extra for path in folder.glob("*.py") if (extra := imported_parts(path) - allowed)}
    assert wrong == {}
