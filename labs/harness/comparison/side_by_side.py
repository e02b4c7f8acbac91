"""Show a comparison to a person: what to decide by, tables, a plot, and JSON.

The sentences are those of the templates `compared.md` and `two_sides.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from labs.harness.analysis.machine_speed import relative_speed_text
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import (
    ONE_SITTING,
    number,
    ratio_ends,
    ratio_number,
    times_with_interval,
)
from labs.harness.analysis.verdicts import Interval
from labs.harness.comparison.comparison import ComparedFigure, Comparison, Reproduction
from labs.harness.comparison.outcomes import usual_reasons
from labs.harness.reports import markdown
from labs.harness.reports.document import Figure, bullets, section, table_of
from labs.harness.reports.markdown import Markdown, code
from labs.harness.reports.templates import filled
from labs.harness.spec.lab import MARGIN
from labs.harness.storage import manifest
from serving import atomic

Placed: TypeAlias = tuple[ComparedFigure, str]  # a figure and its place
MOST_PLACES = 3  # each of which a comparison tells by itself
FIRST_OUTCOMES = ("differs", "undecided", "same", "not comparable")


def document(
    comparisons: Sequence[Comparison],
    refused: Sequence[str],
    figures: Mapping[str, Figure] | None = None,
) -> Markdown:
    """Build a document of comparisons, each with its figure by lab, and what was not compared."""
    labs = [
        section(
            found.lab,
            headline(found),
            (figures or {}).get(found.lab),
            tables(found, comparable(found), "Figures", found.forced, found.loads),
        )
        for found in comparisons
    ]
    return section("Compared", *labs, section("Not compared", bullets(refused)))


def headline(found: Comparison) -> Markdown:
    """Say on what B is better or worse, what was compared, and what may explain it."""
    kinds = ("metric",) if found.same_hardware else ("metric", "effect")
    decided = [
        row
        for row in comparable(found)
        if row.kind in kinds and METRICS[row.metric].across_machines != "listed"
    ]
    there = placed(decided, found.loads)
    return filled(
        "compared.md",
        found=found,
        a=_name(found.a, "A"),
        b=_name(found.b, "B"),
        moved=_moved(there),
        only_a=_only(found, "B"),
        only_b=_only(found, "A"),
        cause=manifest.likeliest_cause(found.differences, ("in A", "in B")),
        speeds=speeds("B's machine", found, "A's"),
        margin=f"{MARGIN:.0%}",
        one_sitting=ONE_SITTING,
    )


def _name(side: str, letter: str) -> Markdown:
    """Call a side by its variant where it is one, else by its letter."""
    _, colon, variant = Path(side).name.partition(":")
    return code(variant) if colon else Markdown(letter)


def _moved(there: Sequence[Placed]) -> list[dict[str, Any]]:
    """Say on what B is better or worse, place by place; where these are many, of all at once.

    The place with the largest change comes first.
    """

    def told(place: str, at: Sequence[Placed]) -> dict[str, Any]:
        found = {name: changes(at, better=name == "better") for name in ("better", "worse")}
        return {"place": place, **found}

    differing = [(row, where) for row, where in there if row.outcome == "differs"]
    largest = sorted(differing, key=lambda at: -_size(at[0]))
    moved = list(dict.fromkeys(where for _, where in largest))
    if len(moved) > MOST_PLACES:
        return [told("", there)]
    only = len({where for _, where in there}) == 1
    return [told("" if only else m, [at for at in there if at[1] == m]) for m in moved]


def _size(row: ComparedFigure) -> float:
    """Return how large a change is, as the logarithm of its ratio; infinite from or to nothing."""
    return abs(math.log(row.contrast.ratio.value)) if row.contrast else math.inf


def _only(found: Comparison, lacking: Literal["A", "B"]) -> list[str]:
    """Name what one side alone has: whole places, and else the figure with its place."""
    places: dict[str, list[ComparedFigure]] = {}
    for row, where in placed(found.rows, found.loads):
        places.setdefault(where, []).append(row)
    missing = f"missing in {lacking}"
    return [
        text
        for where, rows in places.items()
        for text in (
            [where]
            if all(row.why == missing for row in rows)
            else [f"{row.title} at {where}" for row in rows if row.why == missing]
        )
    ]


def comparable(found: Comparison) -> list[ComparedFigure]:
    """Return the figures that both sides have; what the outcome says by itself is no reason."""
    return [
        row.model_copy(update={"why": "" if row.why in usual_reasons() else row.why})
        for row in found.rows
        if not row.why.startswith("missing in")
    ]


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


def changes(there: Sequence[Placed], better: bool) -> list[Change]:
    """List the figures on which B is shown to be better, or else worse."""
    found = []
    of_figure: dict[str, list[Placed]] = {}
    for row, where in there:
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
    """Write how far the ratios reach, and where a side has next to nothing, which has no ratio.

    Of a single row, write both sides as well.
    """
    if len(rows) == 1 and rows[0].contrast:
        (row,) = rows
        ratio = ratio_number(rows[0].contrast.ratio.value)
        return f"{number(row.a, row.unit)} to {number(row.b, row.unit)}, {ratio}x"
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
    loads: Mapping[str, str] | None = None,
) -> Markdown:
    """Tabulate two sides: verdicts, these figures, and what may explain how they differ.

    Figures that differ come first, those that cannot be compared last. Each heading says why the
    two are not comparable, where that was `forced`.
    """
    of_verdicts = _places([v.where for v in found.verdicts], loads)
    in_order = sorted(placed(rows, loads), key=lambda pair: FIRST_OUTCOMES.index(pair[0].outcome))
    return filled(
        "two_sides.md",
        found=found,
        title=title,
        mark=f" (FORCED: {forced})" if forced else "",
        figures=in_order,
        verdicts=list(zip(found.verdicts, of_verdicts, strict=True)),
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


def placed(rows: Sequence[ComparedFigure], loads: Mapping[str, str] | None = None) -> list[Placed]:
    """Give each row its place, in as few words as tell the places apart."""
    return list(zip(rows, _places([row.where for row in rows], loads), strict=True))


def _places(wheres: Sequence[str], loads: Mapping[str, str] | None = None) -> list[str]:
    """Shorten the names of points, or of pairs, by the parts that never vary.

    `loads` has the words for the names of loads.
    """
    points = [point.split("/") for where in wheres for point in where.split(" / ")]
    varied = [i for i, parts in enumerate(zip(*points, strict=True)) if len(set(parts)) > 1]

    def short(point: str) -> str:
        parts = point.split("/")
        words = [(loads or {}).get(parts[i], parts[i]) for i in varied or [-1]]
        return (", " if loads else " ").join(words)

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
    from labs.harness.reports import plots  # imports matplotlib, which few commands draw with

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
    atomic.write(path, markdown.document(document(comparisons, refused, figures)))


def write_json(comparisons: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    """Write comparisons as JSON."""
    found = [c.model_dump(mode="json") for c in comparisons]
    atomic.write(path, json.dumps({"comparisons": found, "refused": list(refused)}, indent=1))
