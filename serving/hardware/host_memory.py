"""How much of the host's memory this process may still take.

A container or a job of a scheduler is given a part of the machine: Linux limits its control group,
or one around it (cgroups(7); memory.max of version 2, memory.limit_in_bytes of version 1). The
machine's own figure does not know that.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SHARED = Path("/dev/shm")
# the files of a limit and of what is used, and the line of memory.stat with what can be given back
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes() -> int:
    """Return what the machine has available, or what the tightest limit leaves of it."""
    return max(0, min([psutil.virtual_memory().available, *_left_bytes()]))


def shared_bytes() -> int | None:
    """Return what is free in /dev/shm, which processes share; None where there is no such place."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def _left_bytes() -> list[int]:
    """Compute what each limited control group around this process leaves."""
    found = []
    for line in OWN.read_text().splitlines() if OWN.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        home, names = GROUPS / controllers, VERSION_1 if controllers else VERSION_2
        group = home / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(home) and (left := _left_in(folder, *names)) is not None:
                found.append(left)
    return found


def _left_in(group: Path, limit: str, used: str, cache: str) -> int | None:
    """Compute what a group leaves; None where it has no limit, or does not tell."""
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - now + int(stat.get(cache, 0))
    except (OSError, ValueError):  # also `max`, which is no limit
        return None
