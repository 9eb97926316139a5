"""An environment of its own for each peer, made once; why there is none is a row of the table too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from peers.registry import Peer

ROOT = Path(__file__).parents[2] / ".venv-peers"
LIMIT = 1200  # seconds of one call of pip


class NotInstalled(Exception):
    """pip's last error line, with what was asked of it."""


def python_of(peer: Peer) -> str:
    """The Python that has the peer, which is installed first where it is not there yet. Raises NotInstalled."""
    if peer.environment is None:
        return sys.executable
    place = ROOT / peer.environment
    python, ready = place / "bin" / "python", place / "installed.txt"
    asked = "\n".join(" ".join(arguments) for arguments in peer.installs)
    if ready.exists() and ready.read_text(encoding="utf-8") == asked:
        return str(python)
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    for arguments in peer.installs:
        install(str(python), arguments)
    ready.write_text(asked, encoding="utf-8")
    return str(python)


def install(python: str, arguments: list[str] | tuple[str, ...]) -> None:
    try:
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *arguments], capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"pip install {' '.join(arguments)}: not done after {LIMIT} s") from None
    if done.returncode:
        raise NotInstalled(f"pip install {' '.join(arguments)}: {why(done.stderr)}")


def why(said: str) -> str:
    """The line that tells most: pip's own last error, and the exception behind it where it shows one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ").removeprefix("error: ") for line in lines if line.lower().startswith("error")]
    raised = [
        line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and not line.lower().startswith("error:")
    ]
    return "; ".join([*raised[-1:], *errors[-1:]])[:400] or "no reason given"
