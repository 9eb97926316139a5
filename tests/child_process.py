"""Python processes that tests start: what they need to find the tests' own modules."""

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from filelock import FileLock


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def killed_at(marker: str, *arguments: str) -> None:
    """Runs Python with `arguments` and kills it (SIGKILL) as soon as it prints the line `marker`."""
    assert signalled_at(marker, signal.SIGKILL, *arguments)[0] == -signal.SIGKILL


def signalled_at(marker: str, number: signal.Signals, *arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of Python with `arguments`, which gets the signal as soon as it prints the line `marker`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs start deaf to it
    child = subprocess.Popen([sys.executable, *arguments], text=True, env=environment(), **pipes, **heard)
    met = any(line.strip() == marker for line in child.stdout)
    child.send_signal(number)
    _, printed = child.communicate()
    assert met, f"{marker}: {printed}"
    return child.returncode, printed


def forked(script: Path, *arguments: str, folder: Path, preload: list[str], ranks: int = 1) -> str:
    """What `script` prints, run in `folder` in a process of its own, forked from one that has imported `preload` already: many
    scripts then pay for the imports once. ranks: run so many at once, as torchrun does, and give what they all print."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    names = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} if ranks > 1 else {} for rank in range(ranks)]
    files = [folder / f"printed{rank}.txt" for rank in range(ranks)]
    children = [context.Process(target=as_main, args=(script, arguments, file, some)) for file, some in zip(files, names)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    printed = "".join(file.read_text(encoding="utf-8") for file in files)
    assert not any(child.exitcode for child in children), printed
    return printed


def by_two_ranks(script: str, tmp_path_factory, worker_id: str) -> Path:
    """The folder that tests/SCRIPT, run on two ranks, has filled; once for all workers of pytest-xdist."""
    if worker_id == "master":
        return filled_by_ranks(script, tmp_path_factory.mktemp(script))
    folder = tmp_path_factory.getbasetemp().parent / script
    with FileLock(f"{folder}.lock"):
        return folder if folder.exists() else filled_by_ranks(script, folder)


def filled_by_ranks(script: str, folder: Path) -> Path:
    draft = folder.with_name(f"{folder.name}-draft")
    draft.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(Path(__file__).with_name(script)), str(draft)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    shutil.rmtree(folder, ignore_errors=True)  # an empty one of pytest's
    draft.rename(folder)
    return folder


def leave() -> None:
    """Ends a rank at once: gloo's threads may still hold its last tensors, and a Python that is being taken down aborts when they
    let go of them (https://github.com/pytorch/pytorch/pull/179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def as_main(script: Path, arguments: tuple[str, ...], file: Path, variables: dict[str, str]) -> None:
    os.chdir(file.parent)
    with file.open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv, sys.path = [str(script), *arguments], [str(script.parent), *sys.path]
    os.environ.update(variables, COLUMNS="160")
    runpy.run_path(str(script), run_name="__main__")
