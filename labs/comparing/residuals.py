"""Tell how near predictions came to what was measured: by figure, by run, and every miss by name.

A residual is measured / predicted. A claim's prediction is a ratio, of two forecasts or by the
lab's own formula; a point's is a figure that was forecast in virtual time, with its band. Bounds
predict nothing that could be missed, and what is not valid or was not measured does not count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from labs import LABS
from labs.filing.committed import committed_runs
from labs.filing.results import RunFolder, Summary, all_runs, unreadable
from labs.judging.judge import AGREEMENT
from labs.judging.metrics import METRICS
from labs.judging.text import number, point_label
from labs.lab import Lab
from labs.telling.document import (
    Inline,
    Link,
    Paragraph,
    Section,
    Table,
    parse,
    plain_text,
    section,
    table,
)

BY_FORECAST = "claims, by the ratio of two forecasts"
BY_FORMULA = "claims, by the lab's formula"
PLACE = ("Lab", "Machine", "Run", "Figure")
INTRODUCTION = (
    "How near predictions that were written before the first engine started came to what was"
    " measured, in full, valid runs. The distance is how far measured / predicted lies from 1."
    " Within 25 % is from p / 1.25 to 1.25 p; a band is what the forecast itself stated. Bounds are"
    " not counted, and nothing is left out because it missed."
)
NONE = "No full run on file has a valid figure that was predicted."


@dataclass(frozen=True)
class Residual:
    """A prediction beside what was measured; `within` is None where it had no band."""

    folder: RunFolder
    lab: str
    machine: str
    group: str  # the figure, or what predicted the claim
    what: str  # the claim, or the point
    predicted: float
    measured: float
    unit: str
    within: bool | None

    @property
    def share(self) -> float:
        return self.measured / self.predicted

    @property
    def near(self) -> bool:
        """Whether the measured figure is within 25 % of the predicted one, up or down."""
        return 1 / AGREEMENT <= self.share <= AGREEMENT


def full_runs(committed: bool) -> list[RunFolder]:
    """List the complete runs that are neither quick, changed, on random weights nor repetitions.

    With `committed`, only runs that git tracks count; else a run that cannot be read is skipped.
    """
    folders = committed_runs() if committed else [f for f in all_runs() if not unreadable(f)]

    def is_full(folder: RunFolder) -> bool:
        run = folder.run()
        return folder.complete and not (run.quick or run.ad_hoc or run.dummy or run.reproduces)

    return [folder for folder in folders if is_full(folder)]


def residuals(folder: RunFolder) -> list[Residual]:
    """List the residuals of a run: its valid claims, then its points' figures."""
    run, summary = folder.run(), folder.summary()
    lab, before = run.rebuilt_lab(), folder.predictions()
    here = (folder, str(run.lab["name"]), run.machine.describe().partition(",")[0])
    claims = [
        Residual(
            *here,
            group=BY_FORECAST if before.closed_forms.get(j.claim) else BY_FORMULA,
            what=f"{plain_text(parse(j.title))} ({point_label(j.treatment, lab)})",
            predicted=j.prediction.value,
            measured=j.effect.ratio.value,
            unit="x",
            within=None,
        )
        for j in summary.judgements
        if j.effect and j.outcome != "not valid" and j.prediction.kind == "point"
    ]
    return [*claims, *_of_points(here, lab, summary)]


def _of_points(here: tuple[RunFolder, str, str], lab: Lab, summary: Summary) -> list[Residual]:
    return [
        Residual(
            *here,
            group=METRICS[f.metric].title,
            what=point_label(f.point, lab),
            predicted=f.value,
            measured=f.measured.value,
            unit=METRICS[f.metric].unit,
            within=f.within,
        )
        for f in summary.in_virtual_time
        if METRICS[f.metric].forecast == "shown"
        and f.measured
        and f.share
        and not any(caveat.hits(f.metric, f.point) for caveat in summary.caveats)
    ]


def page(runs: Sequence[RunFolder], seen_from: Path) -> Section:
    """Write the page of residuals, with links relative to the folder it is `seen_from`."""
    labs = {name: place for place, name in enumerate(LABS)}  # a run's lab may be gone
    figures = [BY_FORECAST, BY_FORMULA, *(m.title for m in METRICS.values())]
    found = [
        residual
        for folder in sorted(
            runs, key=lambda f: (labs.get(f.path.parent.name, len(labs)), f.path.name)
        )
        for residual in residuals(folder)
    ]
    by_figure = sorted(found, key=lambda r: figures.index(r.group))
    misses = [residual for residual in found if not residual.near]
    return section(
        "Forecast beside measured",
        Paragraph(INTRODUCTION if found else NONE),
        section("By figure", _grouped(by_figure, ("Figure",), lambda r: (r.group,))),
        section(
            "By run",
            _grouped(found, PLACE, lambda r: _place(r, seen_from)),
        ),
        section(
            f"Misses: {len(misses)} of {len(found)} lie further off than 25 %",
            _misses(misses, seen_from),
        )
        if misses
        else None,
    )


def _place(residual: Residual, seen_from: Path) -> tuple[Inline, ...]:
    return residual.lab, residual.machine, _report(residual, seen_from), residual.group


def _report(residual: Residual, seen_from: Path) -> Link:
    path = residual.folder.path
    return Link(path.name[:8], os.path.relpath(path / "report.md", seen_from))


def _grouped(
    found: Iterable[Residual],
    header: tuple[str, ...],
    place: Callable[[Residual], tuple[Inline, ...]],
) -> Table:
    """Tabulate residuals by their place: how many, their median distance, how many are near."""
    groups: dict[tuple[Inline, ...], list[Residual]] = {}
    for residual in found:
        groups.setdefault(place(residual), []).append(residual)
    rows: list[list[Inline]] = [
        [
            *cells,
            str(len(mine)),
            f"{median(abs(r.share - 1) for r in mine):.0%}",
            f"{sum(r.near for r in mine)} ({sum(r.near for r in mine) / len(mine):.0%})",
            _within(mine),
        ]
        for cells, mine in groups.items()
    ]
    return table((*header, "Number", "Median distance", "Within 25 %", "Within their band"), rows)


def _within(mine: Sequence[Residual]) -> str:
    known = [r.within for r in mine if r.within is not None]
    return f"{sum(known)} ({sum(known) / len(known):.0%})" if known else "–"


def _misses(misses: Sequence[Residual], seen_from: Path) -> Table:
    rows: list[list[Inline]] = []
    for r in misses:
        figures = [
            f"{number(value)}x" if r.unit == "x" else number(value, r.unit)
            for value in (r.predicted, r.measured)
        ]
        share = f"{r.share:.2f}x"
        rows.append([*_place(r, seen_from), r.what, *figures, share])
    return table((*PLACE, "Where", "Predicted", "Measured", "Measured / predicted"), rows)
