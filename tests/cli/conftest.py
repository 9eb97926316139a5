"""Calls of the command line from outside."""

import pytest

from headprune import cli
from headprune.cli import terminal


def headprune(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one call."""
    capsys.readouterr()  # what came before the call
    monkeypatch.setattr("sys.argv", ["headprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("console", "progress_console"):
        monkeypatch.setattr(terminal, name, type(terminal.console)(stderr=name != "console", width=160))
    return lambda *arguments: headprune(monkeypatch, capsys, *arguments)
