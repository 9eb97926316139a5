"""Does something as soon as a module of another package has been imported, and does not import it: transformers takes seconds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Calls `act`: at once where the module `name` has been imported, else right after it is, in the thread that imports it."""
    waiting = Waiting(name, act)
    sys.meta_path.insert(0, waiting)
    if name in sys.modules:  # asked second: what is begun from now on is watched
        waiting.leave()
        importlib.import_module(name)  # another thread may not be through with it yet
        act()


class Waiting(MetaPathFinder):
    """Finds the module by those behind it on sys.meta_path (those before it do not know the module, or it would not be asked) and
    watches it being loaded."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        finders = sys.meta_path
        if fullname != self.name or self not in finders:
            return None
        behind = (
            finder.find_spec(fullname, path, target)
            for finder in finders[finders.index(self) + 1 :]
            if hasattr(finder, "find_spec")
        )
        spec = next((found for found in behind if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = Watched(spec.loader, self)
        return spec

    def loaded(self) -> None:
        self.leave()
        self.act()

    def leave(self) -> None:
        """Another thread may be going through the list, and would miss the one behind a finder that is taken out of it."""
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


class Watched(Loader):
    """`loader`, which tells `waiting` when it is done. The module itself is left with `loader`; whoever asked for the spec alone
    reads from it here what `loader` has."""

    def __init__(self, loader: Any, waiting: Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.waiting.loaded()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
