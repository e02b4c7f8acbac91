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
from labs.harness.filing.checks import unreadable
from labs.harness.filing.committed import committed_runs
from labs.harness.filing.newest import marks, newest_of, on_cpu
from labs.harness.filing.results import RunFolder, all_runs
from labs.harness.judging.judge import AGREEMENT, Interval, in_band
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import number, point_label, ratio_number
from labs.harness.spec import OF_FORECASTS
from labs.harness.telling.document import (
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
    "How near predictions came to what was measured, in full, valid runs. All of them were written"
    " before the first engine started. The distance is how far measured / predicted lies from 1."
    " Within 25% is from p / 1.25 to 1.25 p; a band is what the forecast itself stated. Bounds are"
    " not counted, nor is a figure that was forecast as 0 and measured as 0; no prediction is left"
    " out because it missed."
)
KEPT = (
    "Reports show no forecast of these: they follow from the figures above, or chance moves them"
    " more. The mean number of requests in decode hardly varies, so that its narrow band is often"
    " missed by little."
)
PACE = (
    "On a machine that is shared, a whole run may be slower or faster than the step was when it"
    " was timed. A run's pace is the median, over its points, of measured / predicted times and"
    " predicted / measured rates (in runs with at least {least} of these). Of the {missed} times"
    " and rates that missed, {near} lie within 25% of the forecast once the pace is taken out:"
    " there the forecast missed the machine's speed, and not what the load does. The others missed"
    " by themselves; the last column tells which. This explains misses, and excuses none: the pace"
    " is taken from what was measured."
)
AIMS = (
    "What forecasts are meant to reach on a machine, over the newest run of each lab. The aims were"
    " stated before the runs that are judged by them, and nothing is fitted to reach them. All"
    " claims count, whether a forecast or the lab's formula predicted them, and all figures with a"
    " band that are listed below. Where more than 97% of these lie within their band, the bands are"
    " too wide, and the aim is missed as well."
)
CLAIMS_NEAR = 52 / 61  # within 25%, as 52 of 61 claims would be
CLAIMS_DISTANCE = 0.08  # the median, at most
POINTS_DISTANCE = {"output_tokens_per_s": 0.10, "tpot_mean_s": 0.10, "ttft_mean_s": 0.15}
WITHIN_BANDS = (0.80, 0.97)  # more would show bands that are too wide
LEAST_TIMED = 6  # figures of a run, whose median is its pace
APART = (
    "Of runs on GPUs that are quick (shorter windows, fewer repeats) or have random weights (whose"
    " speed is real); each is marked. They count in nothing above."
)
NONE = "No full run on file has a valid figure that was predicted."
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


def full_runs(committed: bool) -> list[RunFolder]:
    """List the full runs.

    With `committed`, only runs that git tracks count; else a run that cannot be read is skipped.
    """
    return [folder for folder in _runs(committed) if is_full(folder)]


def runs_apart(committed: bool) -> list[RunFolder]:
    """List the runs on GPUs that are scored apart from the full ones; `committed` as there."""
    return [folder for folder in _runs(committed) if is_apart(folder)]


def _runs(committed: bool) -> list[RunFolder]:
    return committed_runs() if committed else [f for f in all_runs() if not unreadable(f)]


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
    return folder, str(run.lab["name"]), run.machine.name


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
    """Link to the reports of runs, relative to the folder of the page that links."""
    return lambda folder: os.path.relpath(folder.path / "report.md", page_folder)


def page(
    reported: Sequence[Residual],
    link: LinkTo,
    kept: Sequence[Residual] = (),
    apart: Sequence[Residual] = (),
) -> Section:
    """Write the page of these residuals, each with the link to its run.

    `kept` are those of figures that reports leave out: they are told by figure alone. `apart` are
    those of `runs_apart`, which have a section of their own.
    """
    figures = [BY_FORECAST, BY_FORMULA, *(m.title for m in METRICS.values())]
    by_figure = sorted(reported, key=lambda r: figures.index(r.group))
    newest = {folder.path for folder in newest_of(r.folder for r in reported)}
    now = sorted(
        (residual for residual in by_figure if residual.folder.path in newest),
        key=_by_machine,
    )
    misses, paces = [r for r in reported if not r.near], paces_of(reported)
    return section(
        "Forecast beside measured",
        Paragraph(INTRODUCTION if reported else NONE),
        section("Aims", Paragraph(AIMS), _aims(now)) if now else None,
        section(
            "By machine and figure, in the newest run of each lab",
            _grouped(now, ("Machine", "Figure"), lambda r: (r.machine, r.group)),
        )
        if now
        else None,
        section("By figure, in all runs", _grouped(by_figure, ("Figure",), lambda r: (r.group,))),
        section(
            "Other figures that are forecast, by machine, in the newest run of each lab",
            Paragraph(KEPT),
            _grouped(
                sorted(
                    (residual for residual in kept if residual.folder.path in newest),
                    key=lambda r: (*_by_machine(r), figures.index(r.group)),
                ),
                ("Machine", "Figure"),
                lambda r: (r.machine, r.group),
            ),
        )
        if kept
        else None,
        section("By run", _grouped(reported, PLACE, lambda r: _place(r, link))),
        section(
            f"Misses: {len(misses):,} of {len(reported):,} lie further off than 25%",
            _at_their_pace(misses, paces),
            _misses(misses, paces, link),
        )
        if misses
        else None,
        _apart(apart, link),
    )


def _by_machine(residual: Residual) -> tuple[bool, str]:
    """Sort residuals by machine, GPUs first."""
    return on_cpu(residual.folder), residual.machine


def _apart(apart: Sequence[Residual], link: LinkTo) -> Section | None:
    """Tell the residuals of runs that are scored apart, by machine and figure, and every miss."""
    if not apart:
        return None
    figures = [BY_FORECAST, BY_FORMULA, *(m.title for m in METRICS.values())]
    ordered = sorted(apart, key=lambda r: (*_by_machine(r), figures.index(r.group)))
    misses = [r for r in ordered if not r.near]
    return section(
        "Apart: quick runs and random weights on GPUs",
        Paragraph(APART),
        _grouped(
            ordered,
            ("Machine", "Figure"),
            lambda r: (f"{r.machine}{marks(r.folder.run())}", r.group),
        ),
        Paragraph("By run:"),
        _grouped(apart, PLACE, lambda r: _place(r, link)),
        Paragraph(f"{len(misses)} of {len(apart)} lie further off than 25%."),
        _misses(misses, paces_of(apart), link),
    )


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


def _at_their_pace(misses: Iterable[Residual], paces: Mapping[Path, float]) -> Paragraph | None:
    shares = [share for r in misses if (share := _share_at_pace(r, paces)) is not None]
    near = sum(_is_near(share) for share in shares)
    text = PACE.format(least=LEAST_TIMED, missed=len(shares), near=near)
    return Paragraph(text) if shares else None


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
        ]
        for cells, mine in groups.items()
    ]
    return table((*header, "Number", "Median distance", "Within 25%", "Within their band"), rows)


def _within_text(mine: Sequence[Residual]) -> str:
    known = [r.within for r in mine if r.within is not None]
    return f"{sum(known)} ({sum(known) / len(known):.0%})" if known else "–"


def _misses(misses: Sequence[Residual], paces: Mapping[Path, float], link: LinkTo) -> Table:
    rows = []
    for residual in misses:
        share = _share_at_pace(residual, paces)
        at_pace = "–" if share is None else f"{ratio_number(share)}x"
        own = f"{ratio_number(residual.share)}x" if residual.predicted else "–"
        rows.append([*_place(residual, link), residual.what, *residual.figures, own, at_pace])
    columns = ("Where", "Predicted", "Measured", "Measured / predicted", "At the run's pace")
    return table((*PLACE, *columns), rows)
