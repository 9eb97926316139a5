"""Installed either way, headprune must not look like the Hugging Face package `kernels` to transformers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import importlib.util, transformers, headprune, headprune.kernels
from transformers import LlamaConfig
from transformers.utils.import_utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None or "headprune" not in spec.origin, spec
import headprune.kernels.attention_forward
print(is_kernels_available(), headprune.kernels.__path__[0])
"""


def printed(folder: Path, **environment: str) -> list[str]:
    """What SCRIPT prints when it runs in `folder`, the first place that Python imports from."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def regular_install(tmp_path_factory) -> Path:
    """A folder with a regular install of the package, without its extension."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("headprune", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run(command, check=True, env=os.environ | {"HEADPRUNE_NO_EXT": "1"}, capture_output=True)
    return target


def test_an_editable_install_leaves_transformers_kernels_check_alone_also_from_the_root():
    assert printed(ROOT)[0] == printed(Path("/"))[0]


def test_a_regular_install_brings_the_kernels_as_headprune_kernels_and_no_package_kernels(regular_install):
    assert not (regular_install / "kernels").exists()
    available, where = printed(Path("/"), PYTHONPATH=str(regular_install))
    assert available == printed(Path("/"))[0]
    assert Path(where) == regular_install / "headprune" / "kernels"


def test_without_the_extension_the_package_works_through_the_reference_and_says_so_once(regular_install):
    script = """
import torch, headprune as hp
x = torch.zeros(1, 2, 3, 4)
print([hp.ops.attention(x, x, x).sum().item() for _ in range(2)])
"""
    environment = os.environ | {"PYTHONPATH": str(regular_install)}
    done = subprocess.run([sys.executable, "-c", script], cwd="/", env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[0.0, 0.0]"
    assert done.stderr.count("runs through the PyTorch reference") == 1
    assert "not built" in done.stderr


WITHOUT = """
import importlib.metadata, importlib.util, sys
hidden = set("accelerate gguf lm_eval matplotlib onnx onnxruntime onnxscript peft playwright pydantic pynvml timm torchao".split())
find, version = importlib.util.find_spec, importlib.metadata.version
def found(name, package=None):
    return None if name.split(".")[0] in hidden else find(name, package)
def versioned(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
importlib.util.find_spec, importlib.metadata.version = found, versioned
sys.meta_path.insert(0, Hidden)
import headprune
print("imported")
"""


def test_the_package_is_imported_without_any_extra_and_without_what_recipes_need():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr
