"""Rows of several runs of recovery.py as one file and one Markdown table: mean and standard deviation over seeds.

python bench/quality/recovery_table.py first.json second.json -o recovery-minilm.json      # and recovery-minilm.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WAYS = {
    "none": "cut only", "compensation": "compensated", "full": "all weights", "lora": "LoRA", "distillation": "distilled",
    "distillation_and_task": "task + distilled", "lora_distillation": "LoRA, distilled",
    "lora_distillation_and_task": "LoRA, task + distilled", "rewinding": "rewound, distilled",
}  # fmt: skip
RATIOS = {"ratio": "", "ratio on more data": ", on all its test data"}


def joined(files: list[Path]) -> list[Row]:
    """Rows by model, seed, fraction and way; a later file's takes the place of an earlier one's."""
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    by_key = {(row["model"], row["seed"], row["heads"], row["way"]): row for row in rows}
    return [by_key[key] for key in sorted(by_key)]


def table(rows: list[Row]) -> str:
    """For each model a line for each fraction, a column for each way; where more test data were read, those below. Compensation and
    a mere cut hang on no seed."""
    lines = []
    measured = [(model, ratio) for model in sorted({row["model"] for row in rows}) for ratio in RATIOS]
    for model, ratio in measured:
        own = [row for row in rows if row["model"] == model and row["way"] != "dense" and ratio in row]
        ways = list(dict.fromkeys(sorted((row["way"] for row in own), key=list(WAYS).index)))
        if not own:
            continue
        lines += [f"**{model}**, quality over that of the dense model{RATIOS[ratio]}: mean ± standard deviation (seeds)", ""]
        lines += [f"| heads gone | {' | '.join(WAYS[way] for way in ways)} |", f"| --- |{' ---: |' * len(ways)}"]
        for fraction in sorted({row["heads"] for row in own}):
            cells = [cell([row[ratio] for row in own if (row["heads"], row["way"]) == (fraction, way)]) for way in ways]
            lines.append(f"| {fraction:.0%} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the joined rows (JSON); the table lies beside it (.md)")
    arguments = parser.parse_args()
    rows = joined(arguments.files)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
