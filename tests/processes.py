"""Whether a process lives, and on which ports processes listen."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def lives(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended stays a zombie until its parent has waited for it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening_ports(processes: Iterable[psutil.Process]) -> set[int]:
    """The TCP ports on which any of them listens now; one that has ended listens on none."""
    ports = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("tcp")
            ports |= {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}
    return ports
