"""Tables of a run: rows of figures under the names of their columns, as a page says them.

What a page only reads needs no type of its own. A page reads a figure of a row, or one beside the
rows, as `row.tpot_s`; Python reads `row["tpot_s"]`. A lab whose page branches on more than whether
a figure is known adds that to a subclass. A summary keeps all of it as plain JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import Point

Figures = dict[str, Quantity]
"""Figures by their names, with their units."""
Column = str | Callable[[Point], Quantity]
"""A metric, of which a row has the mean over a point's repeats; or what is computed of a point."""


@dataclass(frozen=True)
class Row:
    """Figures of a point, or of something else that has a name."""

    name: str  # of a point, its key
    figures: Figures

    def __getitem__(self, column: str) -> Quantity:
        return self.figures[column]

    @property
    def variant(self) -> str:
        """The variant of the row's point."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, and the figures that hold for all of them."""

    rows: tuple[Row, ...]
    figures: Figures = field(default_factory=dict)

    def __getitem__(self, figure: str) -> Quantity:
        return self.figures[figure]


def rows(run: Context, points: Iterable[Point], **columns: Column) -> tuple[Row, ...]:
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
