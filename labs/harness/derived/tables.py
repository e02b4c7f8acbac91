"""Tables of a run: figures of points under the names of columns, as a page says them.

What a lab's page only reads needs no type of its own. A page reads a figure of a row as
`row.tpot_s`, Python as `row["tpot_s"]`; a summary keeps both kinds of rows as plain JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import Point
from labs.harness.spec.names import PointName

Figures = dict[str, Quantity]
"""Figures by their names, with their units: a row of what is no point, or what stands alone."""
Column = str | Callable[[Point], Quantity]
"""A metric, of which a row has the mean over a point's repeats; or what is computed of a point."""


@dataclass(frozen=True)
class Row:
    """The figures of a point, by the names of their columns."""

    point: str  # its key
    figures: Figures

    def __getitem__(self, column: str) -> Quantity:
        return self.figures[column]

    @property
    def variant(self) -> str:
        return PointName.parse(self.point).variant

    @property
    def workload(self) -> str:
        return PointName.parse(self.point).workload


def table(run: Context, points: Iterable[Point], **columns: Column) -> tuple[Row, ...]:
    """Fills a row for each point, with the columns in their order."""
    return tuple(
        Row(
            point.key,
            {
                name: run.quantity(point, of) if isinstance(of, str) else of(point)
                for name, of in columns.items()
            },
        )
        for point in points
    )


def measured(run: Context, points: Iterable[Point], *metrics: str) -> list[Point]:
    """Lists the points of which all these metrics were measured."""
    return [p for p in points if all(run.quantity(p, metric).known for metric in metrics)]
