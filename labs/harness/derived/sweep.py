"""Fit how the time of a decode step grows with its batch, from a sweep of the load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import Point


def concurrency_sweep(points: Sequence[Point]) -> list[Point]:
    """Lists the closed-loop points of the first workload, in the order of their load."""
    mine = [p for p in points if p.workload.name == points[0].workload.name]
    return sorted((p for p in mine if p.load.kind == "concurrent"), key=lambda p: p.load.users)


@dataclass(frozen=True)
class StepLine:
    """A step's time as a line over its batch, and the throughput that this leads to."""

    fixed_s: Quantity  # of a step without requests
    each_s: Quantity  # that each request in decode adds
    most_per_s: Quantity  # tokens, however large the batch
    half_at: Quantity  # requests in decode, with half of that throughput

    @property
    def growth(self) -> Literal["grows", "none", "unknown"]:
        if self.each_s.value is None:
            return "unknown"
        return "grows" if self.each_s.value > 0 else "none"


def step_line(run: Context) -> StepLine:
    """Fit by least squares through the sweep's repeats, of three or more sizes of the batch."""
    sweep = [
        (size, tpot_s)
        for point in concurrency_sweep(run.points)
        for row in run.rows(point)
        if (size := row.get("batch")) and (tpot_s := row.get("tpot_mean_s"))
    ]
    fixed_s = each_s = Quantity.missing("fewer than three sizes of the batch were measured", "s")
    if len({round(size) for size, _ in sweep}) >= 3:
        sizes, tpots_s = zip(*sweep, strict=True)
        slope, fixed = np.polyfit(sizes, tpots_s, 1)
        fixed_s, each_s = Quantity(float(fixed), "s"), Quantity(float(slope), "s")
    half_at = (fixed_s / each_s).in_unit("1")
    return StepLine(fixed_s, each_s, Quantity(1, "tok/s") / each_s, half_at)
