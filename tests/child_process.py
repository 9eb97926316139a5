"""Python processes that tests start: what they need to find the tests' own modules."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def killed_at(marker: str, *arguments: str) -> None:
    """Runs Python with `arguments` and kills it (SIGKILL) as soon as it prints the line `marker`."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment())
    met = any(line.strip() == marker for line in child.stdout)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert met, marker


def forked(script: Path, *arguments: str, folder: Path, preload: list[str]) -> str:
    """What `script` prints, run in `folder` in a process of its own, forked from one that has imported `preload` already:
    many scripts then pay for the imports once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    child = context.Process(target=as_main, args=(script, arguments, folder))
    child.start()
    child.join()
    printed = (folder / "printed.txt").read_text(encoding="utf-8")
    assert child.exitcode == 0, printed
    return printed


def as_main(script: Path, arguments: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    with open("printed.txt", "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, sys.path = [str(script), *arguments], [str(script.parent), *sys.path]
    os.environ["COLUMNS"] = "160"
    runpy.run_path(str(script), run_name="__main__")
