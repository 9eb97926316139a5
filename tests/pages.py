"""What the documentation's pages hold: code, commands and names, and what of it the package does not have."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from headprune.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINKED = re.compile(r"\b(?:hp|headprune)(?:\.\w+)+")
SHELL = ("", "bash")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in one of `languages`; "" is one without a name."""
    return [code for language, code in FENCE.findall(text) if language in languages]


def inline(text: str) -> list[str]:
    """What stands in backquotes outside of fenced blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text: str) -> list[list[str]]:
    """The words after `headprune` of every call in a shell block."""
    found = []
    for line in "\n".join(blocks(text, *SHELL)).replace("\\\n", " ").splitlines():
        for part in re.split(r"[;|]|&&", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(part)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["headprune"]:
                found.append(words[1:])
    return found


def parse_command(words: list[str]) -> None:
    """Raises what the command line would: for a command or an option that does not exist, a value of another type, one missing."""
    group = typer.main.get_command(app)
    outer = group.make_context("headprune", [word for word in words if word != "--help"] or ["doctor"])
    name, command, rest = group.resolve_command(outer, [*outer._protected_args, *outer.args])
    if "--help" not in words:
        command.make_context(name, rest, parent=outer)


def mentioned_command(code: str) -> list[str]:
    """What is wrong with `headprune name --option ...` in running text, where arguments may be left out."""
    words = code.split(";")[0].split()[1:]
    known = typer.main.get_command(app).commands
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        return []
    if name not in known:
        return [f"{code}: no command {name}"]
    options = {option for one in known[name].params for option in one.opts} | {"--help"}
    return [f"{code}: no option {word}" for word in words[1:] if word.startswith("-") and word not in options]


def unknown(code: str) -> list[str]:
    """Names and keywords of headprune that `code` uses and that do not exist."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "headprune":
            found += [f"{node.module}.{one.name}" for one in node.names if not has(f"{node.module}.{one.name}")]
        elif isinstance(node, ast.Attribute) and (name := dotted(node)) and not has(name):
            found.append(name)
        elif isinstance(node, ast.Call) and (name := dotted(node.func)) and has(name):
            found += [f"{name}({word}=)" for word in unknown_keywords(resolved(name), node)]
    return found


def dotted(node: ast.expr) -> str | None:
    """ "headprune.a.b" of the expression hp.a.b or headprune.a.b, else None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(["headprune", *reversed(names)]) if isinstance(node, ast.Name) and node.id in ("hp", "headprune") else None


def resolved(name: str) -> Any:
    """What the dotted name stands for: modules as far as they go, then attributes. AttributeError where there is none."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                raise AttributeError(path) from None
        found = getattr(found, part)
    return found


def has(name: str) -> bool:
    try:
        resolved(name)
    except AttributeError:
        return False
    return True


def unknown_keywords(function: Any, call: ast.Call) -> Iterator[str]:
    parameters = inspect.signature(function).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        yield from (one.arg for one in call.keywords if one.arg is not None and one.arg not in parameters)


def mentioned_names(code: str) -> list[str]:
    """As `unknown`, of code in running text that need not be Python."""
    try:
        return unknown(code)
    except SyntaxError:
        names = [re.sub("^hp", "headprune", name) for name in LINKED.findall(code)]
        return [name for name in names if not has(name)]
