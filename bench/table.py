"""Prints a result file as a table: `python bench/table.py [FILE]`, the newest in bench/results by default."""

from __future__ import annotations

import json
import sys
from pathlib import Path

QUALITY = ("all-pairs-", "quality-", "recovery-", "schedules-")  # rows of bench/quality, which have a form of their own


def main(arguments: list[str]) -> int:
    found = [path for path in (Path(__file__).parent / "results").glob("*.json") if not path.name.startswith(QUALITY)]
    results = sorted(found, key=lambda path: path.stat().st_mtime)
    if not arguments and not results:
        print("no result file in bench/results; run `make bench` or `make gpu` first", file=sys.stderr)
        return 2
    path = Path(arguments[0]) if arguments else results[-1]
    document = json.loads(path.read_text(encoding="utf-8"))
    machine = document["machine"]
    where = machine["gpu"] or machine["processor"]
    print(f"{path.name}: {where}, torch {machine['torch']}, triton {machine['triton']}")
    width = max(len(row["name"]) for row in document["rows"])
    print(f"{'':{width}} {'ours us':>10} {'peer us':>10} {'ratio':>6} {'floor us':>9}  goal")
    for row in document["rows"]:
        floor = "" if row["floor_us"] is None else f"{row['floor_us']:.1f}"
        verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
        print(
            f"{row['name']:{width}} {row['ours_us']:>10.1f} {row['peer_us']:>10.1f} {row['ratio']:>6.2f} {floor:>9}  "
            f"{row['goal'] or row['peer']} {verdict}"
        )
        if row.get("launched"):
            print(f"{'':{width}} launched from Python, not from a CUDA graph: {', '.join(row['launched'])}")
        for name, peak in (row.get("peak_mb") or {}).items():
            print(f"{'':{width}} peak memory, {name}: {peak:.0f} MB")
    missed = sum(row["met"] is False for row in document["rows"])
    print(f"{len(document['rows'])} rows, {missed} below their goal")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
