"""Build of the package: Python, Triton kernels (as headprune.kernels) and the C++/CUDA extension.

The CPU kernels are built once per instruction set, each into its own library; at import the best one that this
processor runs is loaded (headprune/ops/extension.py), so that a wheel is portable and never needs -march=native.
HEADPRUNE_NO_EXT=1 skips all compilation, HEADPRUNE_NO_CPU=1 that for the CPU; HEADPRUNE_CPU_FLAGS are more flags for compiling and
linking the CPU kernels. What this machine cannot compile is left out with a line that says why: all of it also runs without.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMMON_FLAGS = [
    "-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 sees them in its own AVX-512 intrinsics
]  # fmt: skip
# Compiled with OpenMP, linked without: the one and only OpenMP runtime is then the one that torch brought. Apple's compiler has no
# OpenMP: there the kernels run on one thread.
CPU_FLAGS = [*COMMON_FLAGS, *(["-fopenmp"] if sys.platform != "darwin" else []), "-g0"]
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
        "-mfma", "-mf16c",
    ],
}  # fmt: skip
# The GPUs that the CUDA kernels are built for, as far as the compiler knows them; the PTX of the first serves all later ones.
# TORCH_CUDA_ARCH_LIST says otherwise.
GPUS = ("80", "90a", "100")


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def cuda_headers(cuda_home: Path, site_packages: Path) -> Path | None:
    """Where the CUDA runtime's headers lie: with the compiler, or in the packages that torch's wheels bring."""
    places = [cuda_home / "include", *sorted(site_packages.glob("nvidia/*/include"))]
    needed = ("cuda_runtime_api.h", "crt/host_defines.h")
    return next((place for place in places if all((place / header).exists() for header in needed)), None)


def gpu_flags(nvcc: Path) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    gpus = [gpu for gpu in GPUS if f"compute_{gpu.removesuffix('a')}" in known]
    codes = [(gpu, f"sm_{gpu}") for gpu in gpus] + [(GPUS[0], f"compute_{GPUS[0]}")]
    return [f"-gencode=arch=compute_{gpu},code={code}" for gpu, code in codes]


def no_compiler() -> str | None:
    """Why no C++ is compiled here."""
    compiler = os.environ.get("CXX", "c++")
    if sys.platform == "win32":
        return "the C++ kernels are written for GCC and Clang"
    return None if shutil.which(shlex.split(compiler)[0]) else f"there is no C++ compiler ({compiler})"


def no_cuda(nvcc: Path, headers: Path | None, torch_cuda: str) -> str | None:
    """Why no CUDA is compiled here."""
    if headers is None:
        return f"there are no CUDA headers in {nvcc.parents[1]} or beside torch"
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = (re.findall(r"release (\d+)\.", printed) or ["unknown"])[0]
    return None if release == torch_cuda.split(".")[0] else f"{nvcc} is of CUDA {release}, torch of CUDA {torch_cuda}"


def left_out(what: str, reason: str) -> None:
    print(f"headprune: {reason}, so no {what}", file=sys.stderr)


def extensions() -> tuple[list, dict]:
    if os.environ.get("HEADPRUNE_NO_EXT") == "1":
        return [], {}
    if reason := no_compiler():
        left_out("extension", reason)
        return [], {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    cpu = sources("cpu", ".cpp") + sources("cpu/fp64", ".cpp")
    no_cpu = not cpu or os.environ.get("HEADPRUNE_NO_CPU") == "1"
    names = {} if no_cpu else INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"default": []}
    more = os.environ.get("HEADPRUNE_CPU_FLAGS", "").split()
    built = [
        CppExtension(f"headprune._cpu_{name}", cpu, extra_compile_args=CPU_FLAGS + flags + more, extra_link_args=more)
        for name, flags in names.items()
    ]
    cuda = sources("cuda", ".cu") + sources("cuda", ".cpp")
    if cuda and torch.version.cuda and CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"):
        nvcc, headers = Path(CUDA_HOME) / "bin" / "nvcc", cuda_headers(Path(CUDA_HOME), Path(torch.__file__).parents[1])
        if reason := no_cuda(nvcc, headers, torch.version.cuda):
            left_out("CUDA extension", reason)
        else:
            gpus = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else gpu_flags(nvcc)
            flags = {"cxx": COMMON_FLAGS, "nvcc": ["-O3", "-lineinfo", *gpus]}
            built.append(CUDAExtension("headprune._cuda", cuda, include_dirs=[str(headers)], extra_compile_args=flags))
    return built, {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}


ext_modules, cmdclass = extensions()
folders = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "headprune").rglob("__init__.py"))
setup(
    packages=[*(".".join(folder.parts) for folder in folders), "headprune.kernels"],
    package_dir={"headprune": "headprune", "headprune.kernels": "kernels/triton"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
