"""The processor that this runs on."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Its name, with family and model where Linux tells them: rented processors of several generations share one name."""
    facts = cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    generation = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join(generation)})" if generation else name


def is_amd() -> bool:
    return "AuthenticAMD" in cpuinfo().get("vendor_id", platform.processor())


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; elsewhere nothing."""
    if not CPUINFO.exists():
        return {}
    pairs = (line.partition(":") for line in CPUINFO.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
