"""Compiles every Triton kernel, and every .cu file where nvcc is there, without a GPU: `make aot`.

A kernel takes part by an `aot_variants(capability)` in a module of headprune.kernels. Prints registers, bytes a thread that were
spilled, shared memory and tensor-core instructions; exits with 1 where one fails or asks for more than its architecture has.

    python bench/aot.py [--only statistics]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
COLUMNS = ("kernel", "arch", "registers", "spills", "shared", "tensor_core")


def variants(capability: int) -> Iterator:
    """Every kernel's variants for one architecture (headprune.kernels.launch.AotVariant)."""
    import headprune.kernels

    for found in pkgutil.iter_modules(headprune.kernels.__path__):
        module = importlib.import_module(f"headprune.kernels.{found.name}")
        yield from getattr(module, "aot_variants", lambda capability: ())(capability)


def compile_labelled(capability: int, label: str) -> dict:
    """The row of the variant `label`, its failure included."""
    from headprune.kernels.launch import compile_ahead

    found = next(variant for variant in variants(capability) if variant.label == label)
    row = {"kernel": label, "arch": f"sm_{capability}"}
    try:
        built = compile_ahead(found.launch, capability)
    except Exception as error:
        return row | {"failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    row |= resource_usage(built.asm["cubin"])
    row |= {"shared": built.metadata.shared, "tensor_core": built.asm["ptx"].count(TENSOR_CORES[capability])}
    if row["shared"] > SHARED_BYTES[capability]:
        row["failure"] = f"more than {SHARED_BYTES[capability]} bytes of shared memory"
    elif found.tensor_cores and not row["tensor_core"]:
        row["failure"] = f"no {TENSOR_CORES[capability]}"
    return row


def resource_usage(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    # Triton's functions call nothing, so that whatever lies on the stack was spilled.
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def compile_cuda(path: Path) -> None:
    arches = [("80", "80"), ("90a", "90a"), ("100", "100")]
    flags = [f"-gencode=arch=compute_{virtual},code=sm_{real}" for virtual, real in arches]
    subprocess.run(["nvcc", "-O3", "-Xptxas", "-v", *flags, "-c", str(path), "-o", "/dev/null"], check=True)


def line(row: dict) -> str:
    figures = "".join(f"{row.get(column, ''):>12}" for column in COLUMNS[1:])
    return f"{row['kernel']:48}{figures}{'  FAILED: ' + row['failure'] if 'failure' in row else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile the variants whose label contains this")
    only, failed = parser.parse_args().only, False
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: no Triton kernel was compiled")
    else:
        jobs = [(cap, found.label) for cap in TENSOR_CORES for found in variants(cap) if only in found.label]
        print(line(dict(zip(COLUMNS, COLUMNS))))
        # One process each: the compiler holds the interpreter's lock, and a crash in it ends the process.
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for row in pool.map(compile_labelled, *zip(*jobs)):
                print(line(row), flush=True)
                failed |= "failure" in row
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if shutil.which("nvcc"):
            compile_cuda(path)
        else:
            print(f"nvcc is not on the PATH: {path.name} was not compiled")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
