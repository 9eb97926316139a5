"""Python processes that tests start: what they need to find the tests' own modules."""

import os
import signal
import subprocess
import sys


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def killed_at(marker: str, *arguments: str) -> None:
    """Runs Python with `arguments` and kills it (SIGKILL) as soon as it prints the line `marker`."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment())
    met = any(line.strip() == marker for line in child.stdout)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert met, marker
