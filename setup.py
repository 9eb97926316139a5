"""Build of the package: Python, Triton kernels (as headprune.kernels) and the C++/CUDA extension.

The CPU kernels are built once per instruction set, each into its own library; at import the best one that this
processor runs is loaded (headprune/ops/extension.py), so that a wheel is portable and never needs -march=native.
HEADPRUNE_NO_EXT=1 skips all compilation, HEADPRUNE_NO_CPU=1 that for the CPU; HEADPRUNE_CPU_FLAGS are more flags for compiling and
linking the CPU kernels.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMMON_FLAGS = [
    "-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 sees them in its own AVX-512 intrinsics
]  # fmt: skip
# Compiled with OpenMP, linked without: the one and only OpenMP runtime is then the one that torch brought.
CPU_FLAGS = [*COMMON_FLAGS, "-fopenmp", "-g0"]
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
        "-mfma", "-mf16c",
    ],
}  # fmt: skip
# The GPUs that the CUDA kernels are built for; the PTX serves those that come later. TORCH_CUDA_ARCH_LIST says otherwise.
GPU_FLAGS = [
    *(f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in ("80", "90a", "100")),
    "-gencode=arch=compute_80,code=compute_80",
]  # fmt: skip


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def cuda_headers(cuda_home: Path, site_packages: Path) -> Path | None:
    """Where the CUDA runtime's headers lie: with the compiler, or in the packages that torch's wheels bring."""
    places = [cuda_home / "include", *sorted(site_packages.glob("nvidia/*/include"))]
    needed = ("cuda_runtime_api.h", "crt/host_defines.h")
    return next((place for place in places if all((place / header).exists() for header in needed)), None)


def extensions() -> tuple[list, dict]:
    if os.environ.get("HEADPRUNE_NO_EXT") == "1":
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
        headers = cuda_headers(Path(CUDA_HOME), Path(torch.__file__).parents[1])
        gpu_flags = ["-O3", "-lineinfo", *([] if os.environ.get("TORCH_CUDA_ARCH_LIST") else GPU_FLAGS)]
        flags = {"cxx": COMMON_FLAGS, "nvcc": gpu_flags}
        if headers:
            built.append(CUDAExtension("headprune._cuda", cuda, include_dirs=[str(headers)], extra_compile_args=flags))
        else:
            print(f"headprune: no CUDA headers in {CUDA_HOME} or beside torch, so no CUDA extension", file=sys.stderr)
    return built, {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}


ext_modules, cmdclass = extensions()
folders = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "headprune").rglob("__init__.py"))
setup(
    packages=[*(".".join(folder.parts) for folder in folders), "headprune.kernels"],
    package_dir={"headprune": "headprune", "headprune.kernels": "kernels/triton"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
