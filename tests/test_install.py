"""What the source archive and the wheel hold, and how the package installs.

However it is installed, headprune must not look like the Hugging Face package `kernels` to transformers.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from distribution import built, installed, tree_copy

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
def distributions(tmp_path_factory) -> Path:
    """The source archive and the wheel. There was a library in the tree."""
    tree = tree_copy(tmp_path_factory.mktemp("work") / "tree")
    (tree / "headprune" / "_cpu_default.so").write_text("built in place, for another Python")
    return built(tree, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def regular_install(tmp_path_factory, distributions) -> Path:
    """A folder with the wheel's contents installed."""
    return installed(distributions, tmp_path_factory.mktemp("site"))


def package_files() -> set[str]:
    """What a wheel without the extension consists of: path in the wheel."""
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "headprune").rglob("*.py")}
    kernels = {f"headprune/kernels/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    page = {f"headprune/report/page/{path.name}" for path in (ROOT / "headprune" / "report" / "page").iterdir()}
    return code | kernels | page | {"headprune/py.typed"}


def test_the_wheel_is_the_package_the_kernels_the_page_and_the_licence_and_nothing_built_in_place(distributions):
    (wheel,) = distributions.glob("headprune-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = {name.partition("/")[2]: name for name in files if ".dist-info/" in name}
        assert archive.read(metadata["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert files - set(metadata.values()) == package_files()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tree is no checkout: what belongs to it is not known")
def test_the_source_archive_is_everything_that_is_under_version_control(distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {name for name in tracked if not name.startswith(".")} - files == set()
    assert not [name for name in files if name.endswith((".so", ".pyc"))]


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
