"""Measure the load that others than the run put on this machine, and that of its API servers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import psutil

LOOK_S, MOST_WAIT_S = 0.1, 2.0
IDLE_SHARE = 0.25  # of one core; CPU times have a resolution of 10 ms


class Shares(NamedTuple):
    """Shares of the time of all CPU cores; the engine's is None where its processes are unknown."""

    steal: float  # taken by other guests of the host
    other_processes: float  # used by other processes of this machine
    engine: float | None


def wait_until_idle(pids: Iterable[int], most_s: float = MOST_WAIT_S) -> bool:
    """Wait until these processes and all below them use hardly any CPU time; tell whether they do.

    A worker of vLLM looks out for its next step for a second before it sleeps, on the very core on
    which the machine's speed is timed.
    """
    pids, deadline_s = tuple(pids), time.monotonic() + most_s
    while True:
        began, before_s = time.monotonic(), sum(map(_used_s, pids))
        time.sleep(LOOK_S)
        used_s = sum(map(_used_s, pids)) - before_s
        if used_s <= IDLE_SHARE * (time.monotonic() - began):
            return True
        if time.monotonic() > deadline_s:
            return False


class OtherLoad:
    """Measures the CPU time that others took since this object was created.

    `engine_pids` are the pids above all processes of the engines under load.
    """

    def __init__(self, engine_pids: Sequence[int] = ()) -> None:
        self._engine_pids = engine_pids
        self._began, self._before = time.monotonic(), self._now()

    def _now(self) -> tuple[float, float, float, float]:
        """Read the CPU seconds so far: stolen, used here, used by this run, by its engines."""
        times = psutil.cpu_times()
        used_s = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "softirq"))
        stolen_s = float(getattr(times, "steal", 0.0))
        engines_s = sum(map(_used_s, self._engine_pids))
        return stolen_s, float(used_s), _used_s(os.getpid()), engines_s

    def shares(self) -> Shares:
        """Return what others took, and what the engines used, since the object was created."""
        now = self._now()
        stolen_s, used_s, ours_s, engine_s = (b - a for a, b in zip(self._before, now, strict=True))
        all_s = (time.monotonic() - self._began) * (psutil.cpu_count() or 1)
        return Shares(
            round(stolen_s / all_s, 4),
            round(max(0.0, used_s - ours_s) / all_s, 4),
            round(max(0.0, engine_s) / all_s, 4) if self._engine_pids else None,
        )


class ServerLoad:
    """Reads, while a trial is played, the CPU time that each API server of its engine has used.

    It is that of all threads of the process, without its children: those are the engine cores.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        """Take the pids of the servers; with none, nothing is measured."""
        self._servers = list[psutil.Process]()
        for pid in pids:
            with contextlib.suppress(psutil.Error):  # it has ended
                self._servers.append(psutil.Process(pid))
        self._at_s, self._used_s = list[float](), list[list[float]]()
        self.read()

    def read(self) -> None:
        """Read them now; a few times a second, as a window's ends lie between two readings."""
        with contextlib.suppress(psutil.Error):  # one has ended, and the trial fails by that
            used_s = [sum(server.cpu_times()[:2]) for server in self._servers]
            self._at_s.append(time.monotonic())
            self._used_s.append(used_s)

    def busiest(self, start_s: float, end_s: float) -> float | None:
        """Return the CPU time that the busiest server used between two times, as a share of a core.

        The times are on the machine's monotonic clock, and at them the readings are interpolated.
        None where there is no server, or where the readings do not cover the time.
        """
        covered = self._at_s and self._at_s[0] <= start_s < end_s <= self._at_s[-1]
        if not self._servers or not covered:
            return None
        ends_s = [
            np.interp((start_s, end_s), self._at_s, u) for u in zip(*self._used_s, strict=True)
        ]
        return round(max(float(b - a) for a, b in ends_s) / (end_s - start_s), 4)


def _used_s(pid: int) -> float:
    """Add up the CPU seconds of a process and all below it, with children that have ended."""
    used_s = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                used_s += sum(member.cpu_times()[:4])
    return used_s
