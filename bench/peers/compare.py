"""Every pip-installable package that prunes attention heads, run on the same models, calibration data and number of heads.

    python bench/peers/compare.py                     # `make peers`: installs each into .venv-peers/NAME first
    python bench/peers/compare.py --peers torch-pruning nni --models minilm
    python bench/peers/compare.py --no-times          # on a machine that others use: no figure of time is kept
    python bench/peers/compare.py --table             # only prints the table of what is there

Each peer runs in a process of its own, prunes by its own means, and hands back the outputs of its model; quality is computed here,
for all alike. What cannot be installed or run has a row with its error. Rows are kept as they are measured; --again measures anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1]))

import torch
from machine import machine
from peers.environments import NotInstalled, python_of
from peers.known import PEERS
from peers.registry import Peer
from peers.subjects import SUBJECTS, Subject, quality_of, write_batches
from peers.table import markdown

HERE = Path(__file__).parent
RESULT = HERE / "peers.json"
LIMIT = 1800  # seconds of one run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--heads", type=float, default=0.5, help="the fraction to remove")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--no-times", action="store_true", help="keep no time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("-o", "--output", type=Path, default=RESULT, help="default bench/peers/peers.json; .md beside it")
    arguments = parser.parse_args()
    report = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"rows": []}
    for name in () if arguments.table else arguments.models:
        run(name, arguments, report)
    text = markdown(report["rows"], PEERS)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def run(name: str, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds the missing rows of one model to the file, each as it is measured."""
    there = {(row["model"], row["peer"], row["heads"]) for row in report["rows"]}
    missing = [one for one in arguments.peers if arguments.again or (name, one, arguments.heads) not in there]
    if not missing:
        return
    subject = SUBJECTS[name]()
    with tempfile.TemporaryDirectory() as folder:
        write_batches(subject, Path(folder) / "batches.pt")
        for one in ["dense", *missing]:
            row = {"model": name, "peer": one, "heads": arguments.heads}
            if one == "dense":
                row |= dense_row(subject)
            else:
                row |= measured(PEERS[one], subject, arguments, Path(folder))
            report["rows"] = [
                other for other in report["rows"] if (other["model"], other["peer"], other["heads"]) != tuple(row.values())[:3]
            ]
            report["rows"].append(row)
            report |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine("cpu")}
            arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{name:10s} {one:24s} {row.get('failed') or row.get('lacks') or row['quality']}", flush=True)


def dense_row(subject: Subject) -> dict[str, Any]:
    found = subject.task.evaluate(subject.model)
    return {
        "task": subject.task.name, "headline": subject.task.headline, "higher_is_better": subject.task.higher_is_better,
        "quality": found[subject.task.headline], "query_heads": subject.query_heads,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
    }  # fmt: skip


def measured(peer: Peer, subject: Subject, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the peer's process hands back, with its quality; or why there is nothing."""
    try:
        python = python_of(peer)
    except NotInstalled as error:
        return {"failed": str(error), "stage": "install"}
    if peer.script is None:
        return {"lacks": peer.lacks, "versions": versions(python, peer.package) if peer.package else {}}
    output = folder / "outputs.pt"
    output.unlink(missing_ok=True)
    request = {
        "model": str(subject.folder), "kind": subject.kind, "heads": arguments.heads, "batches": str(folder / "batches.pt"),
        "output": str(output), "packages": [peer.package, "torch", "transformers"],
        "options": peer.options | {"recipe": str(HERE.parents[1] / "recipes" / f"{subject.name}.yaml")},
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    row = carried_out([python, str(HERE / peer.script), str(folder / "request.json")], own=peer.environment is None)
    if output.exists():
        row["quality"] = quality_of(subject, torch.load(output))
        row["query_heads"] = [rows // subject.head_dim for rows in row.pop("query_rows")]
    if arguments.no_times:
        row.pop("scoring", None)
        row.pop("cutting", None)
    return row


def carried_out(command: list[str], own: bool) -> dict[str, Any]:
    """The last line of the child's stdout. command: its last argument is the request, in whose folder it runs, as some peers
    write logs where they are. own: it runs with this environment's packages."""
    environment = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
    try:
        done = subprocess.run(command, env=environment, cwd=Path(command[-1]).parent, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT} s", "stage": "run"}
    sys.stderr.write(done.stderr[-3000:] if done.returncode or '"failed"' in done.stdout else "")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"it ended with {done.returncode}"]
        return {"failed": last[0][:400], "stage": "import"}
    return found | ({"stage": "run"} if "failed" in found else {})


def versions(python: str, package: str) -> dict[str, str]:
    done = subprocess.run(
        [python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], capture_output=True, text=True
    )
    return {package: done.stdout.strip()}


if __name__ == "__main__":
    main()
