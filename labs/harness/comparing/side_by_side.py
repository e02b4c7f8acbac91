"""Show a comparison to a person: what to decide by, tables, a plot, and JSON.

The sentences are those of the templates `compared.md` and `two_sides.md`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labs.harness.comparing.comparison import (
    ComparedFigure,
    Comparison,
    Reproduction,
)
from labs.harness.filing import manifest
from labs.harness.judging.judge import Interval
from labs.harness.judging.machine_speed import relative_speed_text
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import (
    ONE_SITTING,
    number,
    ratio_ends,
    ratio_number,
    times_with_interval,
)
from labs.harness.telling import markdown
from labs.harness.telling.document import Figure, Section, bullets, section, table_of
from labs.harness.telling.markdown import Markdown
from labs.harness.telling.templates import filled
from serving import whole

FIRST_OUTCOMES = ("differs", "undecided", "same", "not comparable")


def document(
    comparisons: Sequence[Comparison],
    refused: Sequence[str],
    figures: Mapping[str, Figure] | None = None,
) -> Section:
    """Build a document of comparisons, each with its figure by lab, and what was not compared."""
    labs = [
        section(
            found.lab,
            headline(found),
            (figures or {}).get(found.lab),
            tables(found, found.rows, "Figures", found.forced),
        )
        for found in comparisons
    ]
    return section("Compared", *labs, section("Not compared", bullets(refused)))


def headline(found: Comparison) -> Markdown:
    """Say on what B is better or worse, what was compared, and what may explain it."""
    kinds = ("metric",) if found.same_hardware else ("metric", "effect")
    decided = [
        row
        for row in found.rows
        if row.kind in kinds and METRICS[row.metric].across_machines != "listed"
    ]
    places = {where for _, where in placed(decided)}
    return filled(
        "compared.md",
        found=found,
        better=changes(decided, better=True),
        worse=changes(decided, better=False),
        only_place=places.pop() if len(places) == 1 else "",
        cause=manifest.likeliest_cause(found.differences, ("in A", "in B")),
        speeds=speeds("B's machine", found, "A's"),
        one_sitting=ONE_SITTING,
    )


@dataclass(frozen=True)
class Change:
    """Holds a figure that differs in one direction, and the places at which it does."""

    title: str
    span: str  # the ratio B / A, or the least and the largest of these
    places: list[str]
    of: int  # places at which both sides have the figure

    @property
    def where(self) -> str:
        """Name the place, or count the places."""
        if len(self.places) == 1:
            return self.places[0]
        count = "all" if len(self.places) == self.of else f"{len(self.places)} of"
        return f"{count} {self.of} points"


def changes(rows: Sequence[ComparedFigure], better: bool) -> list[Change]:
    """List the figures on which B is shown to be better, or else worse."""
    found = []
    of_figure: dict[str, list[tuple[ComparedFigure, str]]] = {}
    for row, where in placed(rows):
        if row.outcome != "not comparable":
            of_figure.setdefault(row.title, []).append((row, where))
    for title, of in of_figure.items():
        moved = [
            (row, where)
            for row, where in of
            if row.outcome == "differs" and ((row.worse_by or 0) < 0) == better
        ]
        if moved:
            span = _span([row for row, _ in moved])
            found.append(Change(title, span, [where for _, where in moved], len(of)))
    return found


def _span(rows: Sequence[ComparedFigure]) -> str:
    """Write how far the ratios reach, and where a side has next to nothing, which has no ratio."""
    ratios = sorted(row.contrast.ratio.value for row in rows if row.contrast)
    ends = dict.fromkeys(f"{ratio_number(ratio)}x" for ratio in (*ratios[:1], *ratios[-1:]))
    texts = [" to ".join(ends)] if ends else []
    without = [row for row in rows if not row.contrast]
    texts += ["from 0" if not row.a else f"to {number(row.b, row.unit)}" for row in without]
    return " or ".join(dict.fromkeys(texts))


def speeds(this: str, found: Comparison | Reproduction, other: str) -> str:
    """Say how fast one machine was beside the other; "" where one timed no reference step."""
    return relative_speed_text(this, found.speeds, other) if found.speeds else ""


def tables(
    found: Comparison | Reproduction,
    rows: Sequence[ComparedFigure],
    title: str,
    forced: str = "",
) -> Markdown:
    """Tabulate two sides: verdicts, these figures, and what may explain how they differ.

    Figures that differ come first, those that cannot be compared last. Each heading says why the
    two are not comparable, where that was `forced`.
    """
    in_order = sorted(placed(rows), key=lambda pair: FIRST_OUTCOMES.index(pair[0].outcome))
    return filled(
        "two_sides.md",
        found=found,
        title=title,
        mark=f" (FORCED: {forced})" if forced else "",
        figures=in_order,
        verdicts=list(zip(found.verdicts, _places([v.where for v in found.verdicts]), strict=True)),
        differences=table_of(manifest.table(found.differences, ("A", "B"))),
        with_ratio=with_ratio,
        number=number,
        ratio_ends=ratio_ends,
        ratio_number=ratio_number,
    )


def with_ratio(outcome: str, ratio: Interval | None) -> str:
    """Write an outcome with its ratio, where that has an interval: `helps, 1.3x (1.2 to 1.4)`."""
    if ratio is None or ratio.low is None:
        return outcome
    return f"{outcome}, {times_with_interval(ratio)}"


def placed(rows: Sequence[ComparedFigure]) -> list[tuple[ComparedFigure, str]]:
    """Give each row its place, in as few words as tell the places apart."""
    return list(zip(rows, _places([row.where for row in rows]), strict=True))


def _places(wheres: Sequence[str]) -> list[str]:
    """Shorten the names of points, or of pairs, by the parts that never vary."""
    points = [point.split("/") for where in wheres for point in where.split(" / ")]
    varied = [i for i, parts in enumerate(zip(*points, strict=True)) if len(set(parts)) > 1]

    def short(point: str) -> str:
        parts = point.split("/")
        return " ".join(parts[i] for i in varied or [-1])

    return [" / ".join(short(p) for p in where.split(" / ")) for where in wheres]


def figures_with_interval(found: Comparison) -> list[tuple[ComparedFigure, str, Interval]]:
    """Return the figures that have an interval, with place and ratio."""
    return [
        (row, where, row.contrast.ratio)
        for row, where in placed(found.rows)
        if row.contrast and row.contrast.ratio.low is not None
    ]


def write(comparisons: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    """Write comparisons as Markdown, with a plot of each lab's ratios in a file beside it."""
    from labs.harness.telling import plots  # imports matplotlib, which few commands draw with

    figures = {}
    for found in comparisons:
        file = path.with_name(f"{path.stem}-{found.lab}.svg")
        ratios = [
            (f"{row.title}, {where}", ratio, row.outcome == "differs")
            for row, where, ratio in figures_with_interval(found)
        ]
        if plots.ratios(ratios, file):
            mark = f" FORCED: {found.forced}." if found.forced else ""
            caption = f"Each figure, B / A, with its 95% interval.{mark}"
            figures[found.lab] = Figure(file.name, caption)
    whole.write(path, markdown.document(document(comparisons, refused, figures)))


def write_json(comparisons: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    """Write comparisons as JSON."""
    found = [c.model_dump(mode="json") for c in comparisons]
    whole.write(path, json.dumps({"comparisons": found, "refused": list(refused)}, indent=1))
