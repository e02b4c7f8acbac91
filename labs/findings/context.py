"""A run as findings see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labs.filing.results import Run, RunFolder
from labs.judging.judge import Caveat, over_repeats
from labs.judging.metrics import Repeats
from labs.lab import Lab, Point


@dataclass(frozen=True)
class Context:
    """A run as findings see it; `values[point][repeat][metric]` holds the measurements."""

    folder: RunFolder
    run: Run
    lab: Lab
    points: list[Point]
    values: Mapping[str, Repeats]
    caveats: Sequence[Caveat] = ()

    def mean(self, point: Point, metric: str) -> float | None:
        """Over the repeats that have it."""
        interval = over_repeats(self.values.get(point.key, {}), metric)
        return interval.value if interval else None

    def point(self, variant: str, workload: str, load: str) -> Point | None:
        wanted = (variant, workload, load)
        every = ((p.variant.name, p.workload.name, str(p.load)) for p in self.points)
        return next((p for p, has in zip(self.points, every, strict=True) if has == wanted), None)
