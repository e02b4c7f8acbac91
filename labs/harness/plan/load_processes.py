"""Choose how many load processes send what a lab sends, where neither it nor the reader says so.

One process sends what comes at one moment request by request, and reads chunk by chunk. The users
of a closed loop may all send and be answered at once, most of all as a trial starts, and then the
last of them wait for the first: so there is one process for each USERS_EACH of them, as far as
there are cores. An open loop does not count: its requests come one by one, and its seats only say
how many of them could be outstanding. Nor do waves, each of which one process sends alone.
"""

from __future__ import annotations

import math

from labs.harness.spec.lab import Lab
from loadtests.arrivals import Waves
from serving.hardware import machine as machines

USERS_EACH = 64
CORES_BESIDE_A_GPU = 2  # that an engine keeps busy: with its API server, and with its scheduler


def chosen_number(lab: Lab, cores: int | None = None) -> int:
    """Return the number by the lab's users; at most one for each of so many cores, at least 1."""
    needed = max(1, math.ceil(most_users(lab) / USERS_EACH))
    return needed if cores is None else max(1, min(needed, cores))


def most_users(lab: Lab) -> int:
    """Return the users of the lab's largest closed loop; 0 where it has none."""
    loads = [load for workload in lab.workloads for load in workload.loads]
    return max(
        (load.users for load in loads if not load.open_loop and not isinstance(load, Waves)),
        default=0,
    )


def cores_for_clients(kind: str) -> int:
    """Count the cores that an engine on this kind of machine leaves to those who send load."""
    _, clients = machines.split_cores(kind)
    return len(clients) - (CORES_BESIDE_A_GPU if kind == "gpu" else 0)
