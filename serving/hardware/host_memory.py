"""How much of the host's memory this process may still take.

A container or a job of a scheduler is given a part of the machine: Linux limits its control group,
or one around it (cgroups(7), version 2). The machine's own figure does not know that.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SHARED = Path("/dev/shm")


def available_bytes() -> int:
    """Return what the machine has available, or what the tightest limit leaves of it."""
    return max(0, min([psutil.virtual_memory().available, *_left_bytes()]))


def shared_bytes() -> int | None:
    """Return what is free in /dev/shm, which processes share; None where there is no such place."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def _left_bytes() -> list[int]:
    """Compute what each limited control group around this process leaves."""
    path = re.search(r"^0::/(.*)$", OWN.read_text() if OWN.exists() else "", re.MULTILINE)
    group = GROUPS / path[1] if path else GROUPS
    groups = [folder for folder in (group, *group.parents) if folder.is_relative_to(GROUPS)]
    return [left for folder in groups if (left := _left_in(folder)) is not None]


def _left_in(group: Path) -> int | None:
    """Compute what a group leaves; None where it has no limit, or does not tell."""
    try:
        most, now = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - now + int(stat.get("inactive_file", 0))  # of files, which can be given back
    except (OSError, ValueError):  # also `max`, which is no limit
        return None
