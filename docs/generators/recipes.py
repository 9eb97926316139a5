"""The keys of a recipe, from the classes that check it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from headprune.recipe import Recipe

from .registry import generator, plain, table


@generator("recipe")
def recipe() -> str:
    return table(["key", "by default", "what it is"], list(rows(Recipe, "")))


def rows(section: type[BaseModel], before: str, needed: str = "required") -> Iterator[list[str]]:
    """needed: what is said of a key without a default."""
    for name, field in section.model_fields.items():
        inside = section_of(field)
        if inside is None:
            yield [f"`{before}{name}`", default_of(field, needed), plain(field.description or "")]
        else:
            optional = not field.is_required() and field.get_default() is None
            yield from rows(inside, f"{before}{name}.", f"without it no {name}" if optional else needed)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def default_of(field: FieldInfo, needed: str) -> str:
    if field.is_required():
        return needed
    value: Any = field.get_default(call_default_factory=True)
    return "" if value is None or value in ({}, []) else f"`{str(value).lower() if isinstance(value, bool) else value}`"
