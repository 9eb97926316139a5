"""timm's models where torchvision is not: its wheels on PyPI are built for CUDA, do not load beside a CPU build of torch, and
then break transformers' vision models too. timm needs it for pictures from a disk and for one norm of convolutional networks."""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


class AnyMember(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Placeholder(ModuleType):
    """A module that has every name asked for, as an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyMember(name, (), {})


class Placeholders(MetaPathFinder, Loader):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def timm_module(name: str) -> ModuleType:
    """timm.models.`name`; the test is skipped where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(f"timm.models.{name}")
    finder = Placeholders()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(f"timm.models.{name}")
    finally:
        sys.meta_path.remove(finder)
        for found in [found for found in sys.modules if found.partition(".")[0] == "torchvision"]:
            del sys.modules[found]  # for all others it stays what it is: not installed
