"""Tables of bench/results: the newest file of a CPU, and of a GPU where there is one."""

from __future__ import annotations

from typing import Any

from .registry import generator, plain, table
from .results import timings

# How the rows of each kind begin, behind the device.
STARTS = {
    "attention": ("forward", "backward", "decode"), "weights": ("weight",), "folder": ("pruning of a folder",),
    "surgery": ("surgery",), "plan": ("latency plan",), "scoring": ("scores", "leave-one-out", "512 random"),
}  # fmt: skip


@generator("measured-on")
def measured_on() -> str:
    """Which machine and file the tables of the CPU are of."""
    document = newest_of(gpu=False)
    machine, rows = document["machine"], document["rows"]
    missed = sum(row["met"] is False for row in rows)
    return (
        f"`bench/results/{document['file']}`: {plain(machine['processor'])}, {machine['threads']} threads, "
        f"{machine['instruction_set']}, torch {machine['torch']}. {len(rows)} rows, {missed} of them below their goal."
    )


@generator("timings")
def of_cpu(kind: str) -> str:
    """kind: of STARTS, or others."""
    return rows_table([row for row in newest_of(gpu=False)["rows"] if kind_of(row) == kind])


@generator("timings-gpu")
def of_gpu() -> str:
    document = newest_of(gpu=True)
    if document is None:
        return "**No kernel of ours has been run or timed on a GPU yet**: `bench/results` holds no file of one."
    return f"`bench/results/{document['file']}`: {plain(document['machine']['gpu'])}.\n\n{rows_table(document['rows'])}"


def newest_of(gpu: bool) -> dict[str, Any] | None:
    return next((one for one in reversed(timings()) if bool(one["machine"]["gpu"]) is gpu), None)


def kind_of(row: dict[str, Any]) -> str:
    name = row["name"].split(" ", 1)[1]
    return next((kind for kind, starts in STARTS.items() if name.startswith(starts)), "others")


def rows_table(rows: list[dict[str, Any]]) -> str:
    verdict = {True: "met", False: "**missed**", None: ""}
    lines = [
        [plain(row["name"]), plain(row["peer"]), plain(row["goal"] or ""), verdict[row["met"]], f"{row['ratio']:.2f}",
         time(row["ours_us"]), time(row["peer_us"]), share(row)]
        for row in rows
    ]  # fmt: skip
    return table(["measured", "peer", "goal", "", "peer / ours", "ours", "peer takes", "floor / ours"], lines, right=4)


def time(microseconds: float) -> str:
    return f"{microseconds:,.0f} µs" if microseconds < 1e4 else f"{microseconds / 1e3:,.1f} ms"


def share(row: dict[str, Any]) -> str:
    return "" if row["floor_us"] is None else f"{row['floor_us'] / row['ours_us']:.0%}"
