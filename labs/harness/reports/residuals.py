"""Report how near predictions came to what was measured: by figure, by run, with every miss.

A residual is measured / predicted. A claim's prediction is a ratio, of two forecasts or by the
lab's own formula; a point's is a figure that was forecast in virtual time, with its band. Bounds
predict nothing that could be missed, and what is not valid or was not measured does not count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from labs import LABS
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import number, point_label, ratio_number
from labs.harness.analysis.verdicts import AGREEMENT, EFFECT_AGREEMENT, Interval, in_band
from labs.harness.reports.document import Inline, Link, Table, parse, plain_text, table
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.templates import filled
from labs.harness.spec.lab import OF_FORECASTS
from labs.harness.storage.machine_names import short_name
from labs.harness.storage.newest import marks, newest_of, on_cpu
from labs.harness.storage.results import RunFolder

BY_FORECAST = "claims, by the ratio of two forecasts"
BY_FORMULA = "claims, by the lab's formula"
PLACE = ("Lab", "Machine", "Run", "Figure")
MACHINE = ("Machine", "Figure")
CLAIMS_NEAR = 52 / 61  # within 25%, as 52 of 61 claims would be
CLAIMS_DISTANCE = 0.08  # the median, at most
POINTS_DISTANCE = {"output_tokens_per_s": 0.10, "tpot_mean_s": 0.10, "ttft_mean_s": 0.15}
WITHIN_BANDS = (0.80, 0.97)  # more would show bands that are too wide
LEAST_TIMED = 6  # figures of a run, whose median is its pace
LinkTo = Callable[[RunFolder], str]  # the address of what tells a run


@dataclass(frozen=True)
class Residual:
    """A prediction beside what was measured; `band` is None where it had none."""

    folder: RunFolder
    lab: str
    machine: str
    group: str  # the figure, or what predicted the claim
    what: str  # the claim, or the point
    predicted: float
    interval: Interval  # measured
    unit: str
    band: tuple[float, float] | None  # within which the forecast itself expected the figure
    effect: float | None = None  # of a claim: the measured effect / the forecast one, of logarithms

    @property
    def measured(self) -> float:
        return self.interval.value

    @property
    def share(self) -> float:
        """Measured / predicted; infinite where only the prediction is 0."""
        return self.measured / self.predicted if self.predicted else math.inf

    @property
    def near(self) -> bool:
        """Whether the measured figure is within 25% of the predicted one, up or down."""
        return _is_near(self.share)

    @property
    def slowdown(self) -> float | None:
        """Measured / predicted time, or its inverse for a rate; None for claims and counts."""
        if self.band is None or not (self.measured and self.predicted):
            return None
        if self.unit == "s":
            return self.share
        return 1 / self.share if self.unit.endswith("/s") else None

    def share_at(self, pace: float) -> float | None:
        """Measured / predicted in a run whose times are all so many times as long as forecast."""
        if self.slowdown is None:
            return None
        return self.share / pace if self.unit == "s" else self.share * pace

    @property
    def within(self) -> bool | None:
        """Whether the measured figure agrees with the forecast's own band; None without one."""
        return in_band(self.interval, *self.band) if self.band else None

    @property
    def figures(self) -> tuple[str, str]:
        """The predicted and the measured figure, in words."""
        predicted, measured = (
            f"{number(value)}x" if self.unit == "x" else number(value, self.unit)
            for value in (self.predicted, self.measured)
        )
        return predicted, measured


def _is_near(share: float) -> bool:
    return 1 / AGREEMENT <= share <= AGREEMENT


def _median_distance(shares: Iterable[float]) -> float:
    return median(abs(share - 1) for share in shares)


def median_distance(shares: Sequence[float]) -> str:
    """Say how far measured / predicted lies from 1, the median of these, as a percentage."""
    distance = _median_distance(shares)
    return f"{distance:.0%}" if math.isfinite(distance) else "infinite"


def is_full(folder: RunFolder) -> bool:
    """Tell whether a run is complete, and not quick, changed, on random weights or a repetition."""
    run = folder.run()
    return folder.complete and not (run.quick or run.ad_hoc or run.dummy or run.reproduces)


def is_apart(folder: RunFolder) -> bool:
    """Tell whether a run is full but for being quick or on random weights, and on a GPU."""
    run = folder.run()
    otherwise_full = folder.complete and not (run.ad_hoc or run.reproduces)
    return otherwise_full and (run.quick or run.dummy) and not on_cpu(folder)


def of_runs(runs: Iterable[RunFolder]) -> list[Residual]:
    """List the residuals of runs, lab by lab in the order of the course."""
    labs = {name: place for place, name in enumerate(LABS)}  # a run's lab may be gone
    ordered = sorted(runs, key=lambda f: (labs.get(f.lab_name, len(labs)), f.path.name))
    return [residual for folder in ordered for residual in residuals(folder)]


def residuals(folder: RunFolder) -> list[Residual]:
    """List the residuals of a run: its valid claims, then its points' figures."""
    summary, lab = folder.summary(), folder.run().rebuilt_lab()
    claims = [
        Residual(
            *_place_of(folder),
            group=BY_FORECAST if j.prediction.source == OF_FORECASTS else BY_FORMULA,
            what=f"{plain_text(parse(j.title))} ({point_label(j.treatment, lab)})",
            predicted=j.prediction.value,
            interval=j.effect.ratio,
            unit="x",
            band=None,
            effect=j.foreseen,
        )
        for j in summary.judgements
        if j.effect and j.outcome != "not valid" and j.prediction.kind == "point"
    ]
    return [*claims, *_of_points(folder, "shown")]


def kept_of_runs(runs: Iterable[RunFolder]) -> list[Residual]:
    """List the residuals of figures that are forecast and that no report sets beside a forecast."""
    return [residual for folder in runs for residual in _of_points(folder, "kept")]


def _place_of(folder: RunFolder) -> tuple[RunFolder, str, str]:
    run = folder.run()
    return folder, str(run.lab["name"]), short_name(run.machine)


def _of_points(folder: RunFolder, which: Literal["kept", "shown"]) -> list[Residual]:
    summary, lab = folder.summary(), folder.run().rebuilt_lab()
    return [
        Residual(
            *_place_of(folder),
            group=METRICS[f.metric].title,
            what=point_label(f.point, lab),
            predicted=f.value,
            interval=f.measured,
            unit=METRICS[f.metric].unit,
            band=(f.low, f.high),
        )
        for f in summary.in_virtual_time
        if METRICS[f.metric].forecast == which
        and f.measured
        and f.share is not None
        and not any(caveat.hits(f.metric, f.point) for caveat in summary.caveats)
    ]


def to_reports(page_folder: Path) -> LinkTo:
    """Link to the reports of runs, or to a run without one, relative to the page's folder."""

    def link(folder: RunFolder) -> str:
        report = folder.path / "report.md"
        return os.path.relpath(report if report.exists() else folder.path, page_folder)

    return link


@dataclass(frozen=True)
class Scores:
    """Holds the residuals of runs: those that count, and what is told beside them."""

    reported: Sequence[Residual]
    kept: Sequence[Residual] = ()  # of figures that reports leave out: told by figure alone
    apart: Sequence[Residual] = ()  # of runs that are scored apart from the full ones

    @classmethod
    def of(cls, runs: Sequence[RunFolder]) -> Scores:
        full, apart = [f for f in runs if is_full(f)], [f for f in runs if is_apart(f)]
        return cls(of_runs(full), kept_of_runs(full), of_runs(apart))


def page(scores: Scores, link: LinkTo) -> Markdown:
    """Write the page of these residuals, each with the link to its run."""
    reported = scores.reported
    newest = {folder.path for folder in newest_of(r.folder for r in reported)}
    now = _by_machine(r for r in reported if r.folder.path in newest)
    kept = _by_machine(r for r in scores.kept if r.folder.path in newest)
    apart = _by_machine(scores.apart)
    misses, paces = [r for r in reported if not r.near], paces_of(reported)
    at_pace = [share for r in misses if (share := _share_at_pace(r, paces)) is not None]
    missed_apart = [r for r in apart if not r.near]
    return filled(
        "scores.md",
        scores=scores,
        aims=_aims(now),
        newest=_grouped(now, MACHINE, _of_machine),
        by_figure=_grouped(sorted(reported, key=_figure), ("Figure",), lambda r: (r.group,)),
        kept=_grouped(kept, MACHINE, _of_machine),
        by_run=_grouped(reported, PLACE, lambda r: _place(r, link)),
        missed=len(misses),
        timed_misses=len(at_pace),
        near_at_pace=sum(map(_is_near, at_pace)),
        least_timed=LEAST_TIMED,
        misses=_misses(misses, paces, link),
        apart=_grouped(apart, MACHINE, _of_machine),
        apart_by_run=_grouped(scores.apart, PLACE, lambda r: _place(r, link)),
        apart_missed=len(missed_apart),
        apart_misses=_misses(missed_apart, paces_of(scores.apart), link),
    )


def _figure(residual: Residual) -> int:
    """The place of a residual's figure among all: claims first."""
    return [BY_FORECAST, BY_FORMULA, *(m.title for m in METRICS.values())].index(residual.group)


def _by_machine(found: Iterable[Residual]) -> list[Residual]:
    """Sort residuals by machine, GPUs first, and by figure."""
    return sorted(found, key=lambda r: (on_cpu(r.folder), r.machine, _figure(r)))


def _of_machine(residual: Residual) -> tuple[str, str]:
    return f"{residual.machine}{marks(residual.folder.run())}", residual.group


@dataclass(frozen=True)
class Aim:
    """What forecasts on a machine are meant to reach, and what they reached."""

    what: str
    wanted: str
    found: str
    met: bool


def aims_of(reported: Sequence[Residual]) -> list[Aim]:
    """List the aims beside what these residuals of one machine show; without figures there is none.

    Shares and distances are held against the aims as they are, and not as they are printed.
    """
    claims = [r for r in reported if r.group in (BY_FORECAST, BY_FORMULA)]
    within = [r.within for r in reported if r.within is not None]
    aims = []
    if claims:
        near, share = _share([r.near for r in claims])
        wanted = f"at least {CLAIMS_NEAR:.0%}"
        aims.append(Aim("Claims within 25%", wanted, near, share >= CLAIMS_NEAR))
        aims.append(_distance_aim("Claims", claims, CLAIMS_DISTANCE))
    for metric, most in POINTS_DISTANCE.items():
        title = METRICS[metric].title
        if figures := [r for r in reported if r.group == title]:
            aims.append(_distance_aim(title, figures, most))
    if within:
        low, high = WITHIN_BANDS
        inside, share = _share(within)
        wanted = f"{low:.0%} to {high:.0%}"
        aims.append(Aim("Figures within their band", wanted, inside, low <= share <= high))
    return aims


def _distance_aim(what: str, figures: Sequence[Residual], most: float) -> Aim:
    shares = [r.share for r in figures]
    found = f"{median_distance(shares)} over {len(shares)}"
    met = _median_distance(shares) <= most
    return Aim(f"{what}: median distance", f"at most {most:.0%}", found, met)


def _share(held: Sequence[bool]) -> tuple[str, float]:
    """Count how many hold, in words, with their share."""
    share = sum(held) / len(held)
    return f"{sum(held)} of {len(held)} ({share:.0%})", share


def _aims(now: Sequence[Residual]) -> Table:
    machines = dict.fromkeys(r.machine for r in now)
    rows = [
        [machine, aim.what, aim.wanted, aim.found, "met" if aim.met else "missed"]
        for machine in machines
        for aim in aims_of([r for r in now if r.machine == machine])
    ]
    return table(("Machine", "Aim", "Wanted", "Found", "Met?"), rows)


def paces_of(reported: Iterable[Residual]) -> dict[Path, float]:
    """Return the pace of each run: how many times as long as forecast its times are, mostly.

    That is the median over its points' times and rates; a run with fewer than LEAST_TIMED has none.
    """
    slowdowns: dict[Path, list[float]] = {}
    for residual in reported:
        if residual.slowdown is not None:
            slowdowns.setdefault(residual.folder.path, []).append(residual.slowdown)
    return {run: median(of) for run, of in slowdowns.items() if len(of) >= LEAST_TIMED}


def _share_at_pace(residual: Residual, paces: Mapping[Path, float]) -> float | None:
    pace = paces.get(residual.folder.path)
    return residual.share_at(pace) if pace else None


def _place(residual: Residual, link: LinkTo) -> tuple[Inline, ...]:
    run = Link(residual.folder.path.name[:8], link(residual.folder))
    marked = marks(residual.folder.run())
    return residual.lab, residual.machine, (run, marked) if marked else run, residual.group


def _grouped(
    members: Iterable[Residual],
    header: tuple[str, ...],
    place: Callable[[Residual], tuple[Inline, ...]],
) -> Table:
    """Tabulate residuals by their place: how many, their median distance, how many are near."""
    groups: dict[tuple[Inline, ...], list[Residual]] = {}
    for residual in members:
        groups.setdefault(place(residual), []).append(residual)
    rows: list[list[Inline]] = [
        [
            *cells,
            str(len(mine)),
            median_distance([r.share for r in mine]),
            f"{sum(r.near for r in mine)} ({sum(r.near for r in mine) / len(mine):.0%})",
            _within_text(mine),
            _effects_text(mine),
        ]
        for cells, mine in groups.items()
    ]
    columns = ("Number", "Median distance", "Within 25%", "Within their band", "Effects within 40%")
    return table((*header, *columns), rows)


def _within_text(mine: Sequence[Residual]) -> str:
    known = [r.within for r in mine if r.within is not None]
    return f"{sum(known)} ({sum(known) / len(known):.0%})" if known else "–"


def _effects_text(mine: Sequence[Residual]) -> str:
    least, largest = 1 / EFFECT_AGREEMENT, EFFECT_AGREEMENT
    known = [least <= r.effect <= largest for r in mine if r.effect is not None]
    return _share(known)[0] if known else "–"


def _misses(misses: Sequence[Residual], paces: Mapping[Path, float], link: LinkTo) -> Table:
    rows = []
    for residual in misses:
        share = _share_at_pace(residual, paces)
        at_pace = "–" if share is None else f"{ratio_number(share)}x"
        own = f"{ratio_number(residual.share)}x" if residual.predicted else "–"
        rows.append([*_place(residual, link), residual.what, *residual.figures, own, at_pace])
    columns = ("Where", "Predicted", "Measured", "Measured / predicted", "At the run's pace")
    return table((*PLACE, *columns), rows)
