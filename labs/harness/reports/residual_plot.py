"""Residuals as pictures that need no script, a lab each, and as data for a script that draws them.

The axis is measured / predicted, logarithmic, so that half and twice lie equally far from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from labs.harness.analysis.verdicts import AGREEMENT
from labs.harness.reports.residuals import LinkTo, Residual, median_distance

LEAST, MOST = 1 / 4, 4  # of the axis; what lies beyond stands at its end
TICKS = (0.25, 0.5, 0.8, 1, 1.25, 2, 4)
WIDTH, LEFT = 420, 16  # of a picture, in its own units: about a phone's pixels
LABEL, DOT, GAP, FOOT = 15, 5, 6, 20  # heights: a row's label, a lane of dots, below a row, axis


@dataclass(frozen=True)
class LabPicture:
    """Holds the residuals of a lab as a picture, and what it shows in words."""

    lab: str
    picture: Markup
    description: str


@dataclass(frozen=True)
class _Row:
    """The residuals of a figure: how many are near, and the dots in lanes that keep them apart."""

    label: str
    distance: str  # the median
    dots: tuple[tuple[float, int, bool], ...]  # abscissa, lane from the top, whether it is near
    lanes: int

    @property
    def description(self) -> str:
        return f"{self.label}, median distance {self.distance}"

    @property
    def height(self) -> float:
        return LABEL + DOT * self.lanes + GAP

    @classmethod
    def of(cls, figure: str, mine: Sequence[Residual]) -> _Row:
        near = sum(r.near for r in mine)
        distance = median_distance([r.share for r in mine])
        ends: list[float] = []  # where the last dot of each lane stands
        dots = []
        for residual in sorted(mine, key=lambda r: r.share):
            x = _x(residual.share)
            lane = next((i for i, end in enumerate(ends) if x - end >= DOT), len(ends))
            ends[lane : lane + 1] = [x]
            dots.append((x, lane, residual.near))
        label = f"{figure}: {near} of {len(mine)} within 25%"
        return cls(label, distance, tuple(dots), len(ends))


def pictures(residuals: Sequence[Residual], titles: Mapping[str, str]) -> Iterator[LabPicture]:
    """Draw the residuals of each lab, in their order; `titles` are those of labs by their names."""
    by_lab: dict[str, dict[str, list[Residual]]] = {}
    for residual in residuals:
        by_lab.setdefault(residual.lab, {}).setdefault(residual.group, []).append(residual)
    for lab, figures in by_lab.items():
        rows = [_Row.of(figure, mine) for figure, mine in figures.items()]
        distances = "; ".join(row.description for row in rows)
        description = f"{titles.get(lab, lab)}, measured / predicted. {distances}."
        yield LabPicture(lab, _picture(rows, description), description)


def _picture(rows: Sequence[_Row], description: str) -> Markup:
    foot = sum(row.height for row in rows)
    least, largest = _x(1 / AGREEMENT), _x(AGREEMENT)
    drawn, top = "", 0.0
    for row in rows:
        drawn += f'<text x="{LEFT}" y="{top + 11:g}">{escape(row.label)}</text>'
        for near, name in ((True, "near"), (False, "far")):
            marks = "".join(
                f"M{x:.1f} {top + LABEL + DOT * (lane + 0.5):g}h0"
                for x, lane, is_near in row.dots
                if is_near == near
            )
            drawn += f'<path class="{name}" d="{marks}"/>' if marks else ""
        top += row.height
    ticks = "".join(
        f'<path class="tick" d="M{_x(t):.1f} {foot:g}v4"/>'
        f'<text class="at" x="{_x(t):.1f}" y="{foot + 15:g}">{t:g}x</text>'
        for t in TICKS
    )
    return Markup(
        '<svg class="shares" viewBox="0 0 {width} {height:g}" role="img"'
        ' aria-label="{description}">'
        '<rect class="agrees" x="{least:.1f}" width="{wide:.1f}" height="{foot:g}"/>'
        '<path class="one" d="M{one:.1f} 0V{foot:g}"/>{drawn}{ticks}</svg>'
    ).format(
        width=WIDTH, height=foot + FOOT, description=description, least=least,
        wide=largest - least, foot=foot, one=_x(1), drawn=Markup(drawn), ticks=Markup(ticks),
    )  # fmt: skip


def _x(share: float) -> float:
    """The abscissa of a share; one beyond the axis stands at its end."""
    inside = min(max(share, LEAST), MOST)
    return LEFT + (WIDTH - 2 * LEFT) * math.log(inside / LEAST) / math.log(MOST / LEAST)


def data(residuals: Sequence[Residual], titles: Mapping[str, str], link: LinkTo) -> dict[str, Any]:
    """Gather what a script draws: every residual with its interval and band, as shares.

    A claim's band is what bears a prediction out: from 1 / 1.25 to 1.25.
    """
    folders = list({r.folder.path: r for r in residuals}.values())
    runs = {r.folder.path: place for place, r in enumerate(folders)}
    labs = list(dict.fromkeys(r.lab for r in residuals))
    figures = list(dict.fromkeys(r.group for r in residuals))
    return {
        "labs": [titles.get(lab, lab) for lab in labs],
        "figures": figures,
        "runs": [
            {"machine": r.machine, "day": r.folder.path.name[:8], "href": link(r.folder)}
            for r in folders
        ],
        "residuals": [
            [
                labs.index(r.lab), figures.index(r.group), runs[r.folder.path], r.what,
                *r.figures, *map(_round, _shares(r)), r.within,
            ]
            for r in residuals
        ],
    }  # fmt: skip


def _shares(of: Residual) -> tuple[float | None, ...]:
    """The measured figure, the ends of its interval and of its band, as multiples of predicted.

    Of a figure of 0, which a logarithmic axis lacks, only the band; of a prediction of 0 nothing.
    """
    if not of.predicted:
        return (None,) * 5
    low, high = (of.interval.low, of.interval.high) if of.measured else (None, None)
    least, most = of.band or (of.predicted / AGREEMENT, of.predicted * AGREEMENT)
    return tuple(
        None if value is None else value / of.predicted
        for value in (of.measured or None, low, high, least, most)
    )


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
