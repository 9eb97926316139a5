"""What setup.py compiles where, from what it hands to setuptools."""

import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

SETUP = Path(__file__).parents[1] / "setup.py"
NVCC = """#!/bin/sh
test "$1" = --version && echo "Cuda compilation tools, release {release}.6, V{release}.6.20" || echo "compute_80 compute_90 {more}"
"""


@pytest.fixture
def extensions(monkeypatch):
    """The extensions by name, when setup.py runs here."""
    for variable in ("HEADPRUNE_NO_EXT", "HEADPRUNE_NO_CPU", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)

    def run() -> dict:
        found = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        runpy.run_path(str(SETUP))
        return {module.name.rpartition(".")[2]: module for module in found["ext_modules"]}

    return run


def toolkit(folder: Path, release: int, more: str = "") -> str:
    """A CUDA toolkit whose compiler says what it is."""
    for name in ("bin/nvcc", "include/cuda_runtime_api.h", "include/crt/host_defines.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(NVCC.format(release=release, more=more))
        (folder / name).chmod(0o755)
    return str(folder)


def test_without_a_compiler_the_package_installs_without_extensions(extensions, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert extensions() == {}
    assert "there is no C++ compiler (no-such-compiler -O2), so no extension" in capsys.readouterr().err


@pytest.mark.parametrize(("machine", "built"), [("x86_64", 3), ("aarch64", 1)])
def test_instruction_sets_are_those_of_the_machine(extensions, monkeypatch, machine, built):
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert len([name for name in extensions() if name.startswith("_cpu_")]) == built


def test_apples_compiler_is_not_asked_for_openmp(extensions, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert "-fopenmp" not in extensions()["_cpu_default"].extra_compile_args


def test_cuda_kernels_are_built_for_the_gpus_that_the_compiler_knows(extensions, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, 12))
    flags = extensions()["_cuda"].extra_compile_args["nvcc"]
    assert [flag.rpartition("=")[2] for flag in flags if "gencode" in flag] == ["sm_80", "sm_90a", "compute_80"]
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, 12, "compute_100"))
    flags = extensions()["_cuda"].extra_compile_args["nvcc"]
    assert [flag.rpartition("=")[2] for flag in flags if "gencode" in flag] == ["sm_80", "sm_90a", "sm_100", "compute_80"]


def test_a_toolkit_of_another_cuda_than_torchs_is_left_alone(extensions, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, 12))
    assert "_cuda" not in extensions()
    assert "nvcc is of CUDA 12, torch of CUDA 13.0, so no CUDA extension" in capsys.readouterr().err
