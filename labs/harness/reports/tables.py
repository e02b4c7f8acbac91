"""The tables of a report: the columns of each, by title, attribute and unit, over rows of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

from labs.harness.analysis.computed import Band, OnTwoEngines, PointForecasts, Predictions, Summary
from labs.harness.analysis.machine_speed import MachineSpeed
from labs.harness.analysis.metrics import METRICS, columns
from labs.harness.analysis.text import (
    between,
    claim_outcome,
    interval,
    number,
    outcome_text,
    point_label,
    prediction_text,
    ratio_interval,
    ratio_number,
    ratio_text,
    verdict_text,
    with_ends,
    yes_or_no,
)
from labs.harness.analysis.verdicts import ForecastAtPoint, Judgement
from labs.harness.derived.lab_modules import published_of
from labs.harness.reports.document import Table
from labs.harness.reports.markdown import Inline, code, parse, plain_text
from labs.harness.spec.lab import MARGIN, OF_FORECASTS, Lab, Point
from labs.harness.spec.names import PairName, PointName
from labs.harness.storage.recorded import Session
from loadtests.latencies import E2E, TTFT
from serving.hardware.gpus import DATASHEETS
from serving.hardware.machine import Ceilings, Machine
from serving.metrics import KvUse

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: its title, and the cell of a row."""

    title: Inline
    cell: Callable[[Row], Inline]


def figure(title: str, attribute: str, unit: str = "1", scale: float = 1) -> Column[Any]:
    """A column of figures: an attribute of each row in its unit, a dash where it is None."""
    value = attrgetter(attribute)

    def cell(row: Any) -> str:
        of_row = value(row)
        return number(None if of_row is None else of_row / scale, unit)

    return Column(title, cell)


def of_point(lab: Lab, title: str = "Point") -> Column[Any]:
    """A column that names the point of each row in words."""
    return Column(title, lambda row: point_label(row.point, lab))


def tabulated(rows: Iterable[Row], *shown: Column[Row]) -> Table:
    return Table([c.title for c in shown], ([c.cell(row) for c in shown] for row in rows))


def without_empty_columns(of: Table) -> Table:
    """The table without the columns that have nothing but dashes."""
    return _with_columns(of, [not set(cells) <= {"–", ""} for _, cells in of.columns()])


def varying(of: Table, keep: Collection[str] = ()) -> tuple[Table, list[tuple[str, str]]]:
    """The table without the columns that say the same in every row, and what those say.

    Columns with a heading to `keep` stay.
    """
    if len(of.rows) < 2:
        return of, []
    varies = [len(set(cells)) > 1 or title in keep for title, cells in of.columns()]
    same = [
        (plain_text(title), plain_text(cells[0]))
        for (title, cells), kept in zip(of.columns(), varies, strict=True)
        if not kept and cells[0] not in ("–", "")
    ]
    return _with_columns(of, varies), same


def without_column(of: Table, title: str) -> Table:
    return _with_columns(of, [heading != title for heading in of.header])


def _with_columns(of: Table, kept: Sequence[bool]) -> Table:
    if not of.rows:
        return of
    header, *rows = [
        [cell for cell, is_kept in zip(row, kept, strict=True) if is_kept]
        for row in (of.header, *of.rows)
    ]
    return Table(header, rows)


# ------------------------------------------------------------------------------------ of claims


def claims(lab: Lab, summary: Summary) -> Table:
    """What was claimed, measured and predicted, and the verdict; a figure that is not valid too."""
    judged = summary.judgements
    several = {j.claim for j in judged if sum(of.claim == j.claim for of in judged) > 1}

    def title(j: Judgement) -> Inline:
        where = f" ({point_label(j.treatment, lab)})" if j.claim in several else ""
        return parse(j.title), where

    return tabulated(
        judged,
        Column("Claim", title),
        Column("Measured", lambda j: f"{ratio_text(j)}{', not valid' * (j.outcome == NOT_VALID)}"),
        Column("95% interval", ratio_interval),
        Column("Predicted", lambda j: f"{ratio_number(j.prediction.value)}x"),
        Column(HELD, claim_outcome),
        Column("Verdict", lambda j: j.outcome),
    )


NOT_VALID, HELD = "not valid", "Did it hold?"


def compared(lab: Lab, summary: Summary) -> Table:
    """What each claim compares, what others published, and the verdict with its reason."""

    def where(j: Judgement) -> str:
        own_margin = "" if j.margin == MARGIN else f"; equal within {100 * j.margin:g}%"
        of_means = "; of the arithmetic means, as a repeat had 0" if _is_of_means(j) else ""
        return f"{_pair(j, lab)}{own_margin}{of_means}"

    def published(j: Judgement) -> str:
        return "; ".join(p.figure for p in published_of(lab.name, "claims", j.claim)) or "–"

    return without_empty_columns(
        tabulated(
            summary.judgements,
            Column("Claim", lambda j: parse(j.title)),
            Column("Figure", lambda j: METRICS[j.metric].title),
            Column("Treatment / baseline", where),
            Column("Published", published),
            Column("Verdict", lambda j: parse(verdict_text(j))),
        )
    )


def _pair(j: Judgement, lab: Lab) -> str:
    return f"{point_label(j.treatment, lab)} / {point_label(j.baseline, lab)}"


def _is_of_means(judgement: Judgement) -> bool:
    return judgement.effect is not None and judgement.effect.of_means


def closed_forms(lab: Lab, summary: Summary, before: Predictions) -> Table:
    """The lab's own formula for claims that forecasts predict."""
    rows = [
        (j, closed)
        for j in summary.judgements
        if (closed := before.closed_forms.get(j.claim, {}).get(str(j.pair)))
        and closed.formula != j.prediction.formula
    ]

    return tabulated(
        rows,
        Column("Claim", lambda row: (parse(row[0].title), f" ({_pair(row[0], lab)})")),
        Column("Measured", lambda row: ratio_text(row[0])),
        Column("Forecast", lambda row: f"{ratio_number(row[0].prediction.value)}x"),
        Column("Closed form", lambda row: f"{ratio_number(row[1].value)}x"),
        Column(
            "Its formula",
            lambda row: (code(row[1].formula), f" ({row[1].source})" if row[1].source else ""),
        ),
    )


# ------------------------------------------------------------------------------------ of points


def points(
    listed_points: Sequence[Point], lab: Lab, summary: Summary, among: Sequence[str] | None = None
) -> Table:
    """Means over repeats, and percentiles of the samples of all repeats together.

    A metric `among` these (all columns unless given) that no point has is left out.
    """

    def of_metric(name: str) -> Column[Point]:
        metric = METRICS[name]
        return Column(metric.title, lambda p: number(summary.value(p.key, name), metric.unit))

    measured = [
        name
        for name in (columns() if among is None else among)
        if any(summary.value(point.key, name) is not None for point in listed_points)
    ]
    return tabulated(
        listed_points,
        Column("Point", lambda point: point_label(point.key, lab)),
        *map(of_metric, measured),
    )


def ttft_at_both_ends(listed_points: Sequence[Point], lab: Lab, summary: Summary) -> Table:
    """TTFT from the send on both sides, which transport and tokenizing set apart."""
    sides = ("client_ttft_mean_s", "engine_ttft_mean_s")
    rows = [
        (point, client_s, engine_s)
        for point in listed_points
        for client_s, engine_s in [[summary.value(point.key, side) for side in sides]]
        if client_s is not None and engine_s is not None
    ]
    return tabulated(
        rows,
        Column("Point", lambda row: point_label(row[0].key, lab)),
        Column("Client's mean", lambda row: number(row[1], "s")),
        Column("Engine's mean", lambda row: number(row[2], "s")),
        Column("Difference", lambda row: number(row[1] - row[2], "s")),
    )


# -------------------------------------------------------------------------------- of predictions


def predictions(lab: Lab, predicted_before: Predictions, left_out: Collection[str] = ()) -> Table:
    """Every figure that was predicted before an engine started, and what predicted it.

    What compares a variant that is left out has no row.
    """
    rows = []
    for claim in lab.claims:
        for pair, prediction in predicted_before.effects[claim.name].items():
            name = PairName.parse(pair)
            sides = (name.treatment, name.baseline)
            if any(PointName.parse(side).variant in left_out for side in sides):
                continue
            where = f"{point_label(name.treatment, lab)} / {point_label(name.baseline, lab)}"
            by = "forecast" if prediction.source == OF_FORECASTS else "formula"
            rows.append((claim.metric, where, f"{ratio_number(prediction.value)}x", by))
    for forecast in lab.forecasts:
        for key, prediction in predicted_before.forecasts[forecast.name].items():
            predicted = prediction_text(prediction, METRICS[forecast.metric].unit)
            rows.append((forecast.metric, point_label(key, lab), predicted, "formula"))
    return tabulated(
        rows,
        Column("Figure", lambda row: METRICS[row[0]].title),
        Column("Where", lambda row: row[1]),
        Column("Predicted", lambda row: row[2]),
        Column("By", lambda row: row[3]),
    )


def _metric(f: Any) -> str:
    return METRICS[f.metric].title


def forecasts(lab: Lab, summary: Summary) -> Table:
    """Every forecast beside what was measured there."""
    return tabulated(
        summary.forecasts,
        Column("Figure", _metric),
        of_point(lab, "Where"),
        Column("Measured", lambda f: number(f.measured and f.measured.value, _unit(f))),
        Column("95% interval", lambda f: interval(f.measured, _unit(f))),
        Column("Predicted", lambda f: prediction_text(f.prediction, _unit(f))),
        Column("Measured / predicted", lambda f: f"{f.share.value:.0%}" if f.share else "–"),
        Column("Did it hold?", lambda f: outcome_text(f.outcome, f.prediction, f.measured)),
    )


def _unit(f: Any) -> str:
    return METRICS[f.metric].unit


def forecast_beside_measured(lab: Lab, summary: Summary) -> Table:
    """Every forecast figure, its band, what was measured, and their ratio."""

    def ratio(f: ForecastAtPoint) -> str:
        return "–" if f.share is None or math.isinf(f.share) else f"{f.share:.2f}x"

    return tabulated(
        [
            f
            for f in summary.in_virtual_time
            if METRICS[f.metric].forecast == "shown" and (f.high or (f.measured or f).value)
        ],
        of_point(lab),
        Column("Figure", _metric),
        Column("Forecast", lambda f: number(f.value, _unit(f))),
        Column("Band", lambda f: between(f.low, f.high, _unit(f))),
        Column("Measured", lambda f: number(f.measured and f.measured.value, _unit(f))),
        Column("Measured / forecast", ratio),
        Column("In band", lambda f: yes_or_no(f.within)),
    )


def in_virtual_time(lab: Lab, forecasts: PointForecasts, also: Collection[str] = ()) -> Table:
    """Every point as vLLM's scheduler plays it in virtual time, each figure with its band.

    A figure that is 0 everywhere, such as preemptions where memory is ample, is left out. `also`
    names metrics that are shown beside those that always are.
    """
    use = [
        Column(f"KV cache in use, {which}", _use_of(forecasts, which))
        for which in ("mean", "peak")
        if forecasts.kv_use
    ]
    return tabulated(
        list(forecasts.points),
        Column("Point", lambda key: point_label(key, lab)),
        *(
            Column(METRICS[metric].title, _band_of(forecasts.points, metric, forecasts.growing))
            for metric in _forecast_columns(forecasts.points.values(), also)
        ),
        *use,
    )


GROWS = "grows"  # in the place of a figure that depends on the length of the run


def _band_of(
    points: Mapping[str, Mapping[str, Band]], metric: str, growing: Collection[str] = ()
) -> Callable[[str], str]:
    of = METRICS[metric]
    depends = growing if of.statistic.latency in (TTFT, E2E) else ()
    return lambda key: GROWS if key in depends else with_band(points[key].get(metric), of.unit)


def _use_of(forecasts: PointForecasts, which: str) -> Callable[[str], str]:
    """Write the mean or the peak of a point's KV cache, with its band where it has one."""

    def text(key: str) -> str:
        use, bands = forecasts.kv_use.get(key), forecasts.kv_bands.get(key, {})
        if which in bands:
            return with_band(bands[which], "share")
        return number(getattr(use, which) if use else None, "share")

    return text


OF_SEARCH = ("goodput_per_s", "output_tokens_per_s", "tpot_mean_s")


def searched(forecasts: PointForecasts) -> Table | None:
    """The settings that are only forecast, by what differs among them; None without any."""
    flags = [
        flag
        for flag in dict.fromkeys(flag for point in forecasts.searched for flag in point.flags)
        if len({str(point.flags.get(flag)) for point in forecasts.searched}) > 1
    ]
    if not flags:
        return None
    return Table(
        (*flags, *(METRICS[metric].title for metric in OF_SEARCH)),
        (
            [
                *(str(point.flags.get(flag, "–")) for flag in flags),
                *(number(point.figures.get(m), METRICS[m].unit) for m in OF_SEARCH),
            ]
            for point in forecasts.searched
        ),
    )


def on_two_engines(lab: Lab, forecasts: PointForecasts) -> Table:
    """What was forecast on two engines, below the same points on one; all is forecast.

    Empty where nothing was forecast on two.
    """
    shown = _forecast_columns([two.bands for two in forecasts.on_two])
    alone = dict.fromkeys(two.point for two in forecasts.on_two)
    rows: dict[str, Mapping[str, Band]] = {
        f"one, {point_label(key, lab)}": forecasts.points[key] for key in alone
    }
    rows |= {engines_text(two, lab): two.bands for two in forecasts.on_two}
    return tabulated(
        list(rows),
        Column("Engines", str.strip),
        *(Column(f"{METRICS[m].title}, forecast", _band_of(rows, m)) for m in shown),
    )


def _forecast_columns(
    rows: Collection[Mapping[str, Band]], also: Collection[str] = ()
) -> list[str]:
    """List the metrics that are shown, and those of `also`, that are not 0 in every row."""
    return [
        name
        for name, metric in METRICS.items()
        if (metric.forecast == "shown" or name in also)
        and any(name in bands and bands[name].high for bands in rows)
    ]


def engines_text(two: OnTwoEngines, lab: Lab) -> str:
    """Say how two engines share the work: `two, half: the requests shared between them`."""
    if two.link_gbit_per_s is None:
        return f"two, {point_label(two.point, lab)}: the requests shared between them"
    return f"two, one prefills and one decodes, {two.link_gbit_per_s:g} Gbit/s between them"


def with_band(band: Band | None, unit: str) -> str:
    """Write a forecast with its band as `50 (43.3 to 55) tok/s`, or a dash where there is none."""
    return with_ends(band.value, band.low, band.high, unit) if band else "–"


def kv_use(lab: Lab, forecasts: PointForecasts, measured: Mapping[str, KvUse]) -> Table:
    """How much of the KV cache was in use at each point; empty without forecasts."""

    def came(which: str) -> Callable[[str], str]:
        return lambda key: number(getattr(measured.get(key), which, None), "share")

    return tabulated(
        list(forecasts.kv_use),
        Column("Point", lambda key: point_label(key, lab)),
        Column("KV cache in use, mean: forecast", _use_of(forecasts, "mean")),
        Column("Measured", came("mean")),
        Column("Peak: forecast", _use_of(forecasts, "peak")),
        Column("Peak: measured", came("peak")),
    )


# ------------------------------------------------------------------- of the machine and the counts


def ceilings(machine: Machine, measured: Ceilings) -> Table:
    """Measured ceilings beside the vendor's; empty for a GPU without known figures."""
    stated = DATASHEETS.get(machine.model)
    rows = []
    for title, field, scale, unit in (
        ("Memory bandwidth", "memory_bandwidth_bytes_per_s", 1e9, "GB/s"),
        ("BF16", "bf16_flops_per_s", 1e12, "TFLOP/s"),
        ("FP8", "fp8_flops_per_s", 1e12, "TFLOP/s"),
    ):
        here, datasheet = getattr(measured, field), stated and getattr(stated, field)
        if datasheet:
            share = f"{here / datasheet:.0%}" if here else "–"
            value = number(here and here / scale, unit)
            rows.append([title, value, number(datasheet / scale, unit), share])
    return Table(("Ceiling", "Measured", "Datasheet", "Share"), rows)


def machine_speed(speed: MachineSpeed) -> Table:
    """The times of the two parts of the reference step over a run."""
    return tabulated(
        [("Reading", speed.reading), ("Computing", speed.computing)],
        Column("Reference step", lambda row: row[0]),
        Column("Median", lambda row: number(row[1].median_s, "s")),
        Column("80% of the times", lambda row: between(row[1].low_s, row[1].high_s, "s")),
        Column("Trend", lambda row: "–" if row[1].trend is None else f"{row[1].trend:+.0%}"),
    )


def agreement(session: Session | None) -> Table:
    """The requests and tokens that records, Prometheus and the engine each counted."""

    def count(side: str) -> Callable[[Any], str]:
        return lambda of: "–" if getattr(of, side) is None else f"{getattr(of, side):,}"

    return tabulated(
        session.agreement if session else (),
        Column("Counted", lambda of: of.what),
        Column("Records", count("records")),
        Column("Prometheus", count("prometheus")),
        Column("Engine", count("engine")),
    )
