"""Fit how the time of a decode step grows with its batch, from a sweep of the load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labs.harness.filing.results import Summary
from labs.harness.spec import Point


def concurrency_sweep(points: Sequence[Point]) -> list[Point]:
    """Lists the closed-loop points of the first workload, in the order of their load."""
    mine = [p for p in points if p.workload.name == points[0].workload.name]
    return sorted((p for p in mine if p.load.kind == "concurrent"), key=lambda p: p.load.users)


def step_line(points: Sequence[Point], summary: Summary) -> tuple[float, float] | None:
    """Fits (seconds of a step without requests, seconds that each request in decode adds).

    Least squares through the sweep's repeats; None with fewer than three sizes of the batch.
    """
    sweep = [
        (size, tpot_s)
        for point in concurrency_sweep(points)
        for row in summary.measurements.get(point.key, {}).values()
        if (size := row.get("batch")) and (tpot_s := row.get("tpot_mean_s"))
    ]
    if len({round(size) for size, _ in sweep}) < 3:
        return None
    sizes, tpots_s = zip(*sweep, strict=True)
    slope, fixed = np.polyfit(sizes, tpots_s, 1)
    return float(fixed), float(slope)
