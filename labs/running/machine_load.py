"""Measure the load that others than the run put on this machine; the report shows it."""

from __future__ import annotations

import contextlib
import time

import psutil


class OtherLoad:
    """Measures the share of all CPU time that others took since this object was created."""

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Read the CPU seconds so far: stolen by other guests, used here, used by this run."""
        times = psutil.cpu_times()
        used_s = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "softirq"))
        me, ours_s = psutil.Process(), 0.0
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                ours_s += sum(process.cpu_times()[:4])  # with children that have ended
        return float(getattr(times, "steal", 0.0)), float(used_s), ours_s

    def shares(self) -> tuple[float, float]:
        """Return the share that other guests of the host took, and that of other processes here."""
        stolen_s, used_s, ours_s = (b - a for a, b in zip(self._before, self._now(), strict=True))
        all_s = (time.monotonic() - self._began) * (psutil.cpu_count() or 1)
        return round(stolen_s / all_s, 4), round(max(0.0, used_s - ours_s) / all_s, 4)
