"""Ctrl-C before the command line is up."""

import os
import signal
import subprocess
import sys

import pytest
from child_process import environment

SCRIPT = "import sys\nfrom headprune.cli import main\nsys.exit(main())\n"  # as pip writes it
INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.fixture
def with_torch(tmp_path):
    """Runs Python with the given arguments and a torch that is interrupted while it is imported."""
    (tmp_path / "torch.py").write_text(INTERRUPTED)

    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    return lambda *arguments: python(*arguments, PYTHONPATH=path)


def python(*arguments, **variables):
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs start deaf to it
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**environment(), **variables}, capture_output=True, text=True, **heard)


@pytest.mark.parametrize("name", ["headprune", "-m"])
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(name, with_torch, tmp_path):
    (tmp_path / name).write_text(SCRIPT)
    done = with_torch("-m", "headprune") if name == "-m" else with_torch(str(tmp_path / name))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_another_program_is_interrupted_as_ever(with_torch, tmp_path):
    (tmp_path / "mine.py").write_text("try:\n    import headprune\nexcept KeyboardInterrupt:\n    print('told')\n")
    done = with_torch(str(tmp_path / "mine.py"), "headprune")
    assert (done.returncode, done.stdout) == (0, "told\n")


def test_ctrl_c_is_an_interrupt_again_once_the_command_runs(tmp_path):
    at_the_end = "import atexit, signal\natexit.register(lambda: print(signal.getsignal(signal.SIGINT).__name__))\n"
    (tmp_path / "headprune").write_text(at_the_end + SCRIPT)
    done = python(str(tmp_path / "headprune"), "--version")
    assert done.stdout.splitlines()[-1] == "default_int_handler"
