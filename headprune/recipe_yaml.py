"""YAML as recipes have it: 1e-5 is a number, and a key stands once."""

from __future__ import annotations

import re
from typing import Any

import yaml

from headprune.errors import InvalidInput

EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")  # a float in YAML 1.2 and JSON, a text in YAML 1.1, which PyYAML reads


class RecipeLoader(yaml.SafeLoader):
    """Raises InvalidInput where a key stands twice; PyYAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise InvalidInput(f"{key.value!r} stands twice in the section of line {node.start_mark.line + 1}.")
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Writes what RecipeLoader reads: a folder that is named 1e5 stands in quotes."""


for kind in (RecipeLoader, RecipeDumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError where `text` is no YAML, or its brackets are nested so deeply that PyYAML gives up."""
    try:
        return yaml.load(text, RecipeLoader)
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deeply") from None


def write_yaml(content: Any) -> str:
    return yaml.dump(content, Dumper=RecipeDumper, sort_keys=False)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Puts `section.key=value`, with a YAML value, into what was read."""
    key, found, value = override.partition("=")
    if not found or not key:
        raise InvalidInput(f"override {override!r}: expected section.key=value, for example plan.budget.heads=0.3.")
    *parents, last = key.split(".")
    for parent in parents:
        if content.get(parent) is None:  # a section that is left empty
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise InvalidInput(f"override {override!r}: {parent} is no section.")
    try:
        content[last] = read_yaml(value)
    except yaml.YAMLError:
        raise InvalidInput(f"override {override!r}: {value!r} is not a YAML value.") from None
