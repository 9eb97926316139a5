"""The compiled libraries: found, for the CPU chosen by instruction set, loaded once.

setup.py builds the CPU kernels once per instruction set, as `headprune/_cpu_<name>.so`. The best one that this processor
runs is loaded; `ATEN_CPU_CAPABILITY` (default, avx2, avx512) lowers the choice, as it does for torch itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_BEST_FIRST = ("avx512", "avx2", "default")


@dataclass(frozen=True)
class Extension:
    """What became of loading a library: `path` of the one that is loaded and, for the CPU, its `instruction_set`; else None
    and `reason`. `skipped` tells of better ones that exist and could not be loaded."""

    instruction_set: str | None
    path: Path | None
    reason: str | None
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = f" ({'; '.join(self.skipped)})" if self.skipped else ""
        return f"{self.path}{notes}" if self.path else f"{self.reason}"


def _way_out(folder: Path) -> str:
    in_tree = (folder.parent / "setup.py").exists()
    return "run `python setup.py build_ext --inplace`" if in_tree else "install from the source archive, with a C++ compiler"


@cache
def cpu_extension(folder: Path = Path(__file__).parents[1]) -> Extension:
    """Loads the library for this processor on the first call and says what was loaded, or why none was."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    wanted = _BEST_FIRST.index(capability) if capability in _BEST_FIRST else _BEST_FIRST.index("default")
    failures = []
    for name in _BEST_FIRST[wanted:]:
        path = folder / f"_cpu_{name}.so"
        if not path.exists():
            continue
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            failures.append(f"{path.name} does not load: {str(error).splitlines()[0]}")
            continue
        return Extension(name, path, None, tuple(failures))
    reason = "; ".join(failures) or f"not built: no _cpu_*.so for {capability} in {folder} ({_way_out(folder)})"
    return Extension(None, None, reason)


@cache
def cuda_extension(folder: Path = Path(__file__).parents[1]) -> Extension:
    """Loads the CUDA kernels on the first call and says what was loaded, or why nothing was."""
    path = folder / "_cuda.so"
    if torch.version.cuda is None:
        return Extension(None, None, "this PyTorch is built without CUDA")
    if not path.exists():
        return Extension(None, None, f"not built: no {path.name} in {folder} ({_way_out(folder)}, with nvcc)")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Extension(None, None, f"{path.name} does not load: {str(error).splitlines()[0]}")
    return Extension(None, path, None)
