"""The source archive and the wheel that tests make of the tree, without the extension, and an installation of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tree_copy(target: Path) -> Path:
    """The tree without what was built or kept in it."""
    leave = shutil.ignore_patterns(".*", "*.so", "__pycache__", "*.egg-info", "build", "dist", "runs")
    return shutil.copytree(ROOT, target, symlinks=True, ignore=leave)


def built(tree: Path, folder: Path) -> Path:
    """`folder` with the source archive of `tree` and the wheel that is built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree]
    subprocess.run(command, check=True, env=os.environ | {"HEADPRUNE_NO_EXT": "1"}, capture_output=True)
    return folder


def installed(distributions: Path, folder: Path) -> Path:
    """`folder` with the contents of the wheel, as pip installs it."""
    (wheel,) = distributions.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return folder
