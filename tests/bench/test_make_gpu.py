"""`make gpu` is run where there is no second chance: it names all that needs a GPU, and its limits leave the benchmarks time."""

import re
import subprocess
import sys
from pathlib import Path

from child_process import environment

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TWO_GPUS = {"tests/recovery/test_recover.py"}


def words(variable: str) -> list[str]:
    (found,) = re.findall(rf"^{variable} := (.*)$", MAKEFILE, re.MULTILINE)
    return found.split()


def test_every_test_that_needs_a_gpu_is_named_and_every_name_exists():
    named = [*words("GPU_FIRST"), *words("GPU_TESTS")]
    assert all((ROOT / name).exists() for name in [*named, *words("LARGE_MODELS")])
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark" + ".gpu" in path.read_text(encoding="utf-8")
    }
    left = {path for path in marked if not any(path == name or path.startswith(f"{name}/") for name in named)}
    assert left == TWO_GPUS


def test_every_gpu_benchmark_is_measured():
    assert {f"bench_gpu_{name}" for name in words("GPU_BENCH")} == {path.stem for path in (ROOT / "bench").glob("bench_gpu_*.py")}


def test_the_benchmarks_have_two_minutes_at_least_and_all_ends_within_nine():
    (end,) = (int(found) for found in re.findall(r"\(STARTED\) \+ (\d+) -", MAKEFILE))
    limits = [int(found) for found in re.findall(r"\$\(CUT_OFF\) (\d+) ", MAKEFILE)]
    (killed,) = (int(found) for found in re.findall(r"^CUT_OFF := timeout -s INT -k (\d+)$", MAKEFILE, re.MULTILINE))
    assert len(limits) == 4
    assert end - sum(limits) - killed * len(limits) >= 120
    assert end + killed <= 9 * 60


def test_every_benchmark_can_be_collected():
    """What a benchmark imports may have moved; those for a GPU run nowhere else."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "bench"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(path.name in done.stdout for path in (ROOT / "bench").glob("bench_*.py"))
