"""Split the time of a forward pass into reading, computing and the rest.

On the roofline a pass that reads slowly is bound by memory bandwidth, however long the engine takes
beside it. The parts say how much of the measured time either ceiling explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND
from labs.findings.drawing import GREY

PARTS_MEAN = (
    "Reading is the time to read weights, keys and values at the measured bandwidth, computing the"
    " time at the measured rate. The rest is launching operations, scheduling, sampling, and what"
    " reading and computing fall short of those ceilings."
)
COUNTED_IN_TURN = (
    "Reading and computing are counted one after the other. Where the device does both at once, the"
    " rest is longer, by at most the shorter of the two."
)


@dataclass(frozen=True)
class Parts:
    """Splits the measured time of a pass; the three parts add up to it.

    Reading and computing are counted one after the other. Where the device does both at once the
    rest is longer, by the shorter of the two at most; a negative rest shows such an overlap.
    """

    measured_s: float
    reading_s: float  # the weights, keys and values, at the measured bandwidth
    computing_s: float  # at the measured BF16 rate

    @property
    def rest_s(self) -> float:
        return self.measured_s - self.reading_s - self.computing_s

    @property
    def limit(self) -> str:
        """Says what limits the pass: the part that takes more than half of its time, if any."""
        parts = {
            "memory bandwidth limits": self.reading_s,
            "arithmetic limits": self.computing_s,
            "neither ceiling limits": self.rest_s,
        }
        most = max(parts, key=parts.__getitem__)
        return most if parts[most] > self.measured_s / 2 else "no one part alone limits"

    def cells(self) -> tuple[str, str, str]:
        """Writes reading, computing and the rest, each as `9.4 ms (36%)`."""
        reading, computing, rest = (
            f"{time} ({share}%)" for time, share in zip(*self._written()[1:], strict=True)
        )
        return reading, computing, rest

    def sentence(self, what: str) -> str:
        """Says what the pass is made of, in numbers that add up as they are printed."""
        reading, computing, rest = self.cells()
        parts = f"{what} takes {self._written()[0]}: {reading} reading, {computing} computing"
        if self.rest_s < 0:
            return f"{parts}, of which {rest.replace('-', '')} overlap."
        return f"{parts}, {rest} the rest."

    def _written(self) -> tuple[str, list[str], list[int]]:
        """Rounds the total, the parts and their percentages, so that both lists add up."""
        unit, scale = ("ms", 1000) if self.measured_s < 0.9995 else ("s", 1)
        digits = max(0, 2 - math.floor(math.log10(scale * self.measured_s)))
        total = round(scale * self.measured_s, digits)
        both = [round(scale * s, digits) for s in (self.reading_s, self.computing_s)]
        times = [*both, round(total - sum(both), digits) + 0.0]  # never a negative zero
        shares = [round(100 * s / self.measured_s) for s in (self.reading_s, self.computing_s)]
        return (
            f"{total:.{digits}f} {unit}",
            [f"{time:.{digits}f} {unit}" for time in times],
            [*shares, 100 - sum(shares)],
        )


def draw_parts(ax: Axes, passes: Mapping[str, Parts]) -> None:
    """Draws each of one or more passes as a bar of its parts in ms, with the measured total.

    Where the device reads and computes at once the two are longer than the pass: the total then
    lies below the top of the bar.
    """
    x, foot = range(len(passes)), [0.0] * len(passes)
    for name, colour, seconds in (
        ("reading", BLUE, [p.reading_s for p in passes.values()]),
        ("computing", BOUND, [p.computing_s for p in passes.values()]),
        ("the rest", GREY, [max(0.0, p.rest_s) for p in passes.values()]),
    ):
        heights = [1000 * s for s in seconds]
        ax.bar(x, heights, 0.6, bottom=foot, color=colour, alpha=0.75, label=name)
        foot = [below + height for below, height in zip(foot, heights, strict=True)]
    measured = [1000 * p.measured_s for p in passes.values()]
    ax.plot(x, measured, "_", color="black", ms=30, mew=2, label="measured")
    for at, top in zip(x, measured, strict=True):
        text = f"{float(f'{top:.3g}'):,.4g}"
        ax.annotate(text, (at, top), xytext=(0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(x, list(passes))
    ax.set_xlim(-0.6, max(1.6, len(passes) - 0.4))
    ax.set_ylim(0, 1.2 * max([*foot, *measured]))
    ax.grid(axis="x", visible=False)
