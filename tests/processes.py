"""Whether a process lives, and which sockets processes listen on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

LISTEN = "0A"  # the state of a socket in the kernel's table of TCP sockets


def lives(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended stays a zombie until its parent has waited for it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening_sockets(processes: Iterable[psutil.Process]) -> set[str]:
    """The TCP sockets on which any of them listens now, by the kernel's numbers.

    Whoever is given the same port later has a socket of another number. A process that has ended
    listens on none.
    """
    sockets = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    link = os.readlink(f"/proc/{process.pid}/fd/{each.fd}")  # as "socket:[1045]"
                    sockets.add(link.partition("[")[2].rstrip("]"))
    return sockets


def still_listening(sockets: set[str]) -> set[str]:
    """Those of the sockets on which somebody listens still, whoever holds them now."""
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return sockets & {number for *_, number in (line[:10] for line in lines if line[3] == LISTEN)}
