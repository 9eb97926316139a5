"""Quality without any training of every one-shot method, on the same model, data and number of heads.

    python bench/quality/compare.py                                        # everything; some hours on two cores
    python bench/quality/compare.py --models minilm --heads 0.5 --seeds 0 --methods fisher ours
    python bench/quality/compare.py --all-pairs                            # MiniLM on more test pairs
    python bench/quality/compare.py --table                                # only writes the table of what is there

Each row is written to the result file as it is measured, and is skipped when it is there (--again METHOD ... measures anew). A seed
is a draw of calibration data; the test data are always the same.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import machine
from quality import published, torch_pruning_heads  # noqa: F401 (they register their methods)
from quality.all_pairs import AllPairs
from quality.methods import Method, Planned, Refused, Setting, methods
from quality.rows import Rows
from quality.summary import write_summary
from spent import Spent, spending

from headprune.evaluation.tasks import build_task
from headprune.models import attention_sites
from headprune.sources import EMBEDDED, open_model

RESULTS = Path(__file__).parents[1] / "results"


def measure(method: Method, setting: Setting, fractions: list[float], dense: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each fraction: quality, seconds and peak memory of each step, or why there is none."""
    try:
        seen = setting.observe(method.needs(setting.name))
        with spending() as spent:
            scored = method.score(setting, seen.observed)
    except Refused as reason:
        for fraction in fractions:
            yield identity(method, setting, fraction) | {"refused": str(reason)}
        return
    for fraction in fractions:
        row = identity(method, setting, fraction)
        try:
            yield row | one_cut(method, setting, scored, fraction, dense, seen.spent + spent)
        except Refused as reason:
            yield row | {"refused": str(reason)}


def one_cut(
    method: Method, setting: Setting, scored: Any, fraction: float, dense: dict[str, Any], scoring: Spent
) -> dict[str, Any]:
    task, model = setting.task, copy.deepcopy(setting.model)
    with spending() as planning:
        planned = method.plan(setting, scored, fraction)
    with spending() as cutting:
        model = method.cut(setting, scored, planned, model)
    quality = task.evaluate(model)
    steps, whole = {"scoring": scoring, "planning": planning, "cut and compensation": cutting}, scoring + planning + cutting
    return {
        "kept": kept_heads(setting, planned),
        "quality": quality,
        "of_dense": quality[task.headline] / dense["quality"][task.headline],
        "seconds": {name: spent.seconds for name, spent in steps.items()},
        "cpu_seconds": {name: spent.cpu_seconds for name, spent in steps.items()},
        "peak_mb": whole.megabytes,
        "note": planned.note,
    }


def kept_heads(setting: Setting, planned: Planned) -> list[int]:
    return [len(planned.keep[site.name]) for site in attention_sites(setting.model)]


def identity(method: Method, setting: Setting, fraction: float) -> dict[str, Any]:
    """What a row is of; a row with the same identity is not measured twice."""
    found = {"model": setting.name, "method": method.name, "heads": fraction, "seed": setting.seed}
    return found | {"settings": method.settings(setting.name)}


def dense_row(setting: Setting, rows: Rows) -> dict[str, Any]:
    """The unpruned model, on the test data that all seeds share."""
    wanted = {"model": setting.name, "method": "dense", "heads": 0.0, "seed": 0, "settings": {}}
    found = rows.find(wanted)
    if found is None:
        task = setting.task
        found = wanted | {
            "task": task.name, "headline": task.headline, "higher_is_better": task.higher_is_better, "test_digest": task.digest,
            "kept": [site.head_map.query_heads for site in attention_sites(setting.model)], "quality": task.evaluate(setting.model),
        }  # fmt: skip
        rows.add(found)
    return found


def run(arguments: argparse.Namespace, rows: Rows) -> None:
    for name in arguments.models:
        model, tokenizer = open_model(name)
        for seed in arguments.seeds:
            chosen = [methods()[method] for method in arguments.methods]
            chosen = [method for method in chosen if method.seeded or seed == arguments.seeds[0]]
            setting = Setting(name, model, None, seed)
            missing = {
                method.name: [one for one in arguments.heads if not rows.has(identity(method, setting, one), arguments.again)]
                for method in chosen
            }
            if not any(missing.values()):
                continue
            task = AllPairs(tokenizer, seed) if arguments.all_pairs else build_task(EMBEDDED[name].task, tokenizer, seed=seed)
            setting = Setting(name, model, task, seed)
            dense = dense_row(setting, rows)
            for method in chosen:
                for row in measure(method, setting, missing[method.name], dense) if missing[method.name] else ():
                    rows.add(row)
                    print(line(row), flush=True)
                    write_summary(rows, arguments.output)
                gc.collect()


def line(row: dict[str, Any]) -> str:
    start = f"{row['model']:10s} {row['method']:20s} {row['heads']:5.2f} seed {row['seed']}"
    if "refused" in row:
        return f"{start}  {row['refused']}"
    seconds = sum(row["seconds"].values())
    return f"{start}  {row['of_dense']:7.3f} of dense  {seconds:6.1f} s  {row['peak_mb']:6.0f} MB  kept {row['kept']}"


def result_file(start: str) -> Path:
    """The newest of this machine, so that a run goes on over midnight."""
    earlier = sorted(path for path in RESULTS.glob(f"{start}-*.json") if not path.name.endswith(".summary.json"))
    return earlier[-1] if earlier else RESULTS / f"{start}-{datetime.date.today():%Y-%m-%d}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(EMBEDDED), choices=list(EMBEDDED))
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--heads", nargs="+", type=float, default=[0.25, 0.5, 0.65, 0.75], help="fractions to remove")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", nargs="+", default=[], metavar="METHOD", help="methods whose rows are measured anew")
    parser.add_argument("--all-pairs", action="store_true", help="MiniLM alone, on all its test pairs (bench/quality/all_pairs.py)")
    parser.add_argument("--table", action="store_true", help="only write the table of the rows that are there")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="default the newest bench/results/quality-<machine>-<date>.json (all-pairs-...), else a new one; .md beside it",
    )
    arguments = parser.parse_args()
    found = machine("cpu")
    arguments.models = ["minilm"] if arguments.all_pairs else arguments.models
    arguments.output = arguments.output or result_file(f"{'all-pairs' if arguments.all_pairs else 'quality'}-{found['slug']}")
    rows = Rows(arguments.output, found)
    if not arguments.table:
        torch.manual_seed(0)
        run(arguments, rows)
    print(write_summary(rows, arguments.output))


if __name__ == "__main__":
    main()
