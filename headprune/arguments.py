"""Arguments of public functions beside their annotations: a plain mistake is one clear line before anything is done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from inspect import Parameter, signature
from numbers import Real
from operator import index
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from headprune.errors import HeadpruneError, InvalidInput, unknown_name

P = ParamSpec("P")
R = TypeVar("R")


def check_arguments(of: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """InvalidInput where a value in `given` is of another kind than the annotation of that name in `of` (a function or a class)
    says: `check_arguments(prune, locals())` as its first statement. Containers are not looked into."""
    for name, hint in hints_of(of).items():
        if name in given and not fits(given[name], hint):
            raise InvalidInput(f"{name} is {one_line(given[name])}; expected {described(hint)}.") from None
        if name in given and is_path(given[name]) and is_path_hint(hint):
            refuse_impossible(name, given[name])


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, too often called to check its arguments first: they are looked at when it fails. What a kernel refuses (a length
    beyond the cache) is InvalidInput too."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        try:
            return function(*args, **options)
        except HeadpruneError:
            raise
        except (AttributeError, TypeError, RuntimeError):
            try:
                given = signature(function).bind(*args, **options).arguments
            except TypeError:  # an argument too many or too few, which Python's own message names together with the function
                given = {}
            refuse_spread(given)
            check_arguments(function, given)
            raise
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    return run


def refuse_spread(given: Mapping[str, Any]) -> None:
    """InvalidInput where a tensor in `given` is spread over ranks, for which PyTorch's own operators alone know what to do."""
    for name, value in given.items():
        if is_spread(value):
            raise InvalidInput(
                f"{name} is a DTensor; expected a tensor of this rank: {name}.to_local() where samples or whole heads are split, "
                f"else {name}.full_tensor()."
            ) from None


def is_spread(value: Any) -> bool:
    """By its name: torch imports it when it is asked for."""
    return type(value).__name__ == "DTensor"


def check_options(of: str, options: Iterable[str], known: Iterable[str]) -> None:
    """InvalidInput where one of the `options` that `of` hands on is not known."""
    known = set(known)
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {of}", name, known)


def keywords(*functions: Callable[..., Any]) -> list[str]:
    """The keyword-only arguments of the functions."""
    parameters = [found for function in functions for found in signature(function).parameters.values()]
    return [found.name for found in parameters if found.kind is Parameter.KEYWORD_ONLY]


def one_line(value: Any) -> str:
    """The beginning of its repr, which of a model or tensor has many lines."""
    return " ".join(repr(value).split())[:80]


@cache
def hints_of(of: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(of).items() if name != "return"}


def fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, TypeVar) or getattr(hint, "_is_protocol", False) or hint is Any:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in choices(hint))
    kind = kind_of(hint)
    return KINDS[kind][0](value) if kind in KINDS else isinstance(value, kind)


def kind_of(hint: Any) -> Any:
    return hint if hint in KINDS else get_origin(hint) or hint


def choices(union: Any) -> list[Any]:
    """The members of a union. A string beside a device must name one; beside a path it is one."""
    found = list(get_args(union))
    return [one for one in found if one is not str] if {torch.device, Path, os.PathLike[str]} & set(found) else found


def described(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(described(one) for one in choices(hint)))
    kind = kind_of(hint)
    return KINDS[kind][1] if kind in KINDS else f"{kind.__name__}{ORIGINS.get(kind.__name__, '')}"


def is_whole(value: Any) -> bool:
    try:
        index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value  # NaN is no number


def is_switch(value: Any) -> bool:
    return isinstance(value, (bool, int)) or type(value).__name__ == "bool"  # numpy's


def is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def is_path_hint(hint: Any) -> bool:
    return any(kind_of(one) in (Path, os.PathLike) for one in (hint, *get_args(hint)))


def refuse_impossible(name: str, path: str | os.PathLike[str]) -> None:
    """InvalidInput where no file can have this path: it holds a NUL, or is longer than the system takes."""
    try:
        os.lstat(path)
        return
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return
        reason = os.strerror(error.errno)
    raise InvalidInput(f"{name} is {one_line(path)}, which no file can be called: {reason}.")


def is_several(value: Any) -> bool:
    return not isinstance(value, (str, bytes)) and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


def is_device(value: Any) -> bool:
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return True


# What an annotation admits, and what it is called. All of these may also stand with their parameters: Mapping[str, int].
KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    NoneType: (lambda value: value is None, "None"),
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    bool: (is_switch, "True or False"),
    str: (lambda value: isinstance(value, str), "a string"),
    Literal: (lambda value: isinstance(value, str), "a string"),
    Path: (is_path, "a path"),
    os.PathLike: (is_path, "a path"),
    Callable: (callable, "a function"),
    Mapping: (lambda value: isinstance(value, Mapping), "a dict"),
    dict: (lambda value: isinstance(value, Mapping), "a dict"),
    Iterable: (is_several, "a list"),
    Iterable[Any]: (is_several, "a list of batches"),
    Sequence: (is_several, "a list"),
    torch.device: (is_device, 'a device such as "cpu" or "cuda:0"'),
    torch.dtype: (lambda value: isinstance(value, torch.dtype), "a dtype such as torch.float32"),
    nn.Module: (lambda value: isinstance(value, nn.Module), "a torch.nn.Module (hp.load(folder) gives one)"),
    Tensor: (lambda value: isinstance(value, Tensor), "a tensor"),
}
# Where to get one.
ORIGINS = {
    "Budget": " (hp.Budget(heads=0.5), say)",
    "Distillation": " (hp.Distillation(logits=1.0), say)",
    "HeadMap": " (HeadMap((0, 0, 1), 2), say)",
    "HeadScores": " (hp.score gives them)",
    "LatencyTable": " (headprune.evaluation.measure_latency_table gives one)",
    "Observations": " (hp.observe gives them)",
    "PruningPlan": " (hp.plan gives one)",
    "Sensitivity": " (headprune.planning.sensitivity gives one)",
    "Task": " (headprune.evaluation.tasks.build_task gives one)",
}
