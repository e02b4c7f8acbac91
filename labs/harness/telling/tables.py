"""Build the tables of a report from the typed files of a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from labs.harness.facts.parts import published_of
from labs.harness.filing.results import (
    Band,
    OnTwoEngines,
    PointForecasts,
    Predictions,
    Session,
    Summary,
    pair_of,
    points_of,
)
from labs.harness.judging.judge import Judgement
from labs.harness.judging.machine_speed import MachineSpeed
from labs.harness.judging.metrics import METRICS, columns
from labs.harness.judging.text import (
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
from labs.harness.spec import MARGIN, OF_FORECASTS, Lab, Point
from labs.harness.telling.document import Code, Inline, Table, parse, table
from serving.hardware.gpus import DATASHEETS
from serving.hardware.machine import Ceilings, Machine
from serving.metrics import KvUse


def ceilings(machine: Machine, measured: Ceilings) -> Table:
    """Tabulate measured ceilings beside the vendor's; empty for a GPU without known figures."""
    rows: list[list[Inline]] = []
    stated = DATASHEETS.get(machine.model)
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
    return table(("Ceiling", "Measured", "Datasheet", "Share"), rows)


def predictions(lab: Lab, predicted_before: Predictions) -> Table:
    """Tabulate every figure that was predicted before an engine started, and what predicted it."""
    rows: list[list[Inline]] = []
    for claim in lab.claims:
        for pair, prediction in predicted_before.effects[claim.name].items():
            treatment, baseline = points_of(pair)
            where = f"{point_label(treatment, lab)} / {point_label(baseline, lab)}"
            by = "forecast" if prediction.source == OF_FORECASTS else "formula"
            ratio = f"{ratio_number(prediction.value)}x"
            rows.append([METRICS[claim.metric].title, where, ratio, by])
    for forecast in lab.forecasts:
        metric = METRICS[forecast.metric]
        for key, prediction in predicted_before.forecasts[forecast.name].items():
            predicted = prediction_text(prediction, metric.unit)
            rows.append([metric.title, point_label(key, lab), predicted, "formula"])
    return table(("Figure", "Where", "Predicted", "By"), rows)


def claims(lab: Lab, summary: Summary) -> Table:
    """Tabulate the judgements: what was claimed, measured, predicted and published; the verdict."""
    return table(
        ("Claim", "Measured", "95% interval", "Predicted", "Did it hold?", "Published", "Verdict"),
        (_claim(lab, judgement) for judgement in summary.judgements),
    )


def _claim(lab: Lab, j: Judgement) -> list[Inline]:
    pair = f"{point_label(j.treatment, lab)} / {point_label(j.baseline, lab)}"
    own_margin = "" if j.margin == MARGIN else f"; equal within {100 * j.margin:g}%"
    of_means = "; of the arithmetic means, as a repeat had 0" if _is_of_means(j) else ""
    where = f" ({METRICS[j.metric].title}: {pair}{own_margin}{of_means})"
    figures = [p.figure for p in published_of(lab.name, "claims", j.claim)]
    return [
        (parse(j.title), where),
        ratio_text(j),
        ratio_interval(j),
        f"{ratio_number(j.prediction.value)}x",
        claim_outcome(j),
        "; ".join(figures) or "–",
        parse(verdict_text(j)),
    ]


def _is_of_means(judgement: Judgement) -> bool:
    return judgement.effect is not None and judgement.effect.of_means


def points(
    listed_points: Sequence[Point], lab: Lab, summary: Summary, among: Sequence[str] | None = None
) -> Table:
    """Tabulate means over repeats, and percentiles of the samples of all repeats together.

    A metric `among` these (all columns unless given) that no point has is left out.
    """
    among = columns() if among is None else among
    metrics = [c for c in among if any(summary.value(p.key, c) is not None for p in listed_points)]
    return table(
        ("Point", *(METRICS[metric].title for metric in metrics)),
        (
            [
                point_label(point.key, lab),
                *(number(summary.value(point.key, m), METRICS[m].unit) for m in metrics),
            ]
            for point in listed_points
        ),
    )


def forecasts(lab: Lab, summary: Summary) -> Table:
    """Tabulate every forecast beside what was measured there."""
    rows: list[list[Inline]] = []
    for f in summary.forecasts:
        unit = METRICS[f.metric].unit
        rows.append(
            [
                METRICS[f.metric].title,
                point_label(f.point, lab),
                number(f.measured.value if f.measured else None, unit),
                interval(f.measured, unit),
                prediction_text(f.prediction, unit),
                f"{f.share.value:.0%}" if f.share else "–",
                outcome_text(f.outcome, f.prediction, f.measured),
            ]
        )
    header = (
        "Figure", "Where", "Measured", "95% interval", "Predicted", "Measured / predicted",
        "Did it hold?",
    )  # fmt: skip
    return table(header, rows)


def in_virtual_time(lab: Lab, forecasts: PointForecasts, also: Collection[str] = ()) -> Table:
    """Tabulate every point as vLLM's scheduler plays it in virtual time, each figure with its band.

    A figure that is 0 everywhere, such as preemptions where memory is ample, is left out. `also`
    names metrics that are shown beside those that always are.
    """
    metrics = _forecast_columns(forecasts.points.values(), also)
    return table(
        (
            "Point",
            *(METRICS[metric].title for metric in metrics),
            *(("KV cache in use, mean", "KV cache in use, peak") if forecasts.kv_use else ()),
        ),
        (
            [
                point_label(key, lab),
                *(with_band(bands.get(metric), METRICS[metric].unit) for metric in metrics),
                *_shares(forecasts, key),
            ]
            for key, bands in forecasts.points.items()
        ),
    )


OF_SEARCH = ("goodput_per_s", "output_tokens_per_s", "tpot_mean_s")


def searched(forecasts: PointForecasts) -> Table | None:
    """Tabulate the settings that are only forecast by what differs among them; None without any."""
    points = forecasts.searched
    flags = [
        flag
        for flag in dict.fromkeys(flag for point in points for flag in point.flags)
        if len({str(point.flags.get(flag)) for point in points}) > 1
    ]
    if not flags:
        return None
    return table(
        (*flags, *(METRICS[metric].title for metric in OF_SEARCH)),
        (
            [
                *(str(point.flags.get(flag, "–")) for flag in flags),
                *(number(point.figures.get(m), METRICS[m].unit) for m in OF_SEARCH),
            ]
            for point in points
        ),
    )


def on_two_engines(lab: Lab, forecasts: PointForecasts) -> Table:
    """Tabulate what was forecast on two engines, below the same points on one; all is forecast.

    Empty where nothing was forecast on two.
    """
    metrics = _forecast_columns([two.bands for two in forecasts.on_two])
    rows = [
        (f"one, {point_label(key, lab)}", forecasts.points[key])
        for key in dict.fromkeys(two.point for two in forecasts.on_two)
    ] + [(engines_text(two, lab), two.bands) for two in forecasts.on_two]
    return table(
        ("Engines", *(f"{METRICS[metric].title}, forecast" for metric in metrics)),
        (
            [engines, *(with_band(bands.get(metric), METRICS[metric].unit) for metric in metrics)]
            for engines, bands in rows
        )
        if forecasts.on_two
        else (),
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


def _shares(forecasts: PointForecasts, point: str) -> list[str]:
    """Write the mean and the peak, with bands where there are; nothing without any of a point."""
    if not forecasts.kv_use:
        return []
    use, bands = forecasts.kv_use.get(point), forecasts.kv_bands.get(point, {})
    shares = {"mean": use.mean if use else None, "peak": use.peak if use else None}
    return [
        with_band(bands[which], "share") if which in bands else number(share, "share")
        for which, share in shares.items()
    ]


def with_band(band: Band | None, unit: str) -> str:
    """Write a forecast with its band as `50 (43.3 to 55) tok/s`, or a dash where there is none."""
    return with_ends(band.value, band.low, band.high, unit) if band else "–"


def forecast_beside_measured(lab: Lab, summary: Summary) -> Table:
    """Tabulate every forecast figure, its band, what was measured, and their ratio."""
    rows: list[list[Inline]] = []
    for f in summary.in_virtual_time:
        unit = METRICS[f.metric].unit
        if METRICS[f.metric].forecast != "shown" or not (f.high or (f.measured or f).value):
            continue
        rows.append(
            [
                point_label(f.point, lab),
                METRICS[f.metric].title,
                number(f.value, unit),
                between(f.low, f.high, unit),
                number(f.measured.value if f.measured else None, unit),
                "–" if f.share is None or math.isinf(f.share) else f"{f.share:.2f}x",
                yes_or_no(f.within),
            ]
        )
    header = ("Point", "Figure", "Forecast", "Band", "Measured", "Measured / forecast", "In band")
    return table(header, rows)


def kv_use(lab: Lab, forecasts: PointForecasts, measured: Mapping[str, KvUse]) -> Table:
    """Tabulate how much of the KV cache was in use at each point; empty without forecasts."""
    rows: list[list[Inline]] = []
    for point in forecasts.kv_use:
        came = measured.get(point)
        mean, peak = _shares(forecasts, point)
        rows.append(
            [
                point_label(point, lab),
                mean,
                number(came.mean if came else None, "share"),
                peak,
                number(came.peak if came else None, "share"),
            ]
        )
    header = (
        "Point", "KV cache in use, mean: forecast", "Measured", "Peak: forecast", "Peak: measured",
    )  # fmt: skip
    return table(header, rows)


def closed_forms(lab: Lab, summary: Summary, before: Predictions) -> Table:
    """Tabulate the lab's own formula for claims that forecasts predict."""
    rows: list[list[Inline]] = [
        [
            (
                parse(j.title),
                f" ({point_label(j.treatment, lab)} / {point_label(j.baseline, lab)})",
            ),
            ratio_text(j),
            f"{ratio_number(j.prediction.value)}x",
            f"{ratio_number(closed.value)}x",
            (Code(closed.formula), f" ({closed.source})" if closed.source else ""),
        ]
        for j in summary.judgements
        if (closed := before.closed_forms.get(j.claim, {}).get(pair_of(j.treatment, j.baseline)))
        and closed.formula != j.prediction.formula
    ]
    return table(("Claim", "Measured", "Forecast", "Closed form", "Its formula"), rows)


def machine_speed(speed: MachineSpeed) -> Table:
    """Tabulate the times of the two parts of the reference step over a run."""
    return table(
        ("Reference step", "Median", "80% of the times", "Trend"),
        (
            [
                title,
                number(part.median_s, "s"),
                between(part.low_s, part.high_s, "s"),
                "–" if part.trend is None else f"{part.trend:+.0%}",
            ]
            for title, part in (("Reading", speed.reading), ("Computing", speed.computing))
        ),
    )


def agreement(session: Session | None) -> Table:
    """Tabulate the requests and tokens that records, Prometheus and the engine each counted."""
    return table(
        ("Counted", "Records", "Prometheus", "Engine"),
        (
            [
                counted.what,
                f"{counted.records:,}",
                "–" if counted.prometheus is None else f"{counted.prometheus:,}",
                "–" if counted.engine is None else f"{counted.engine:,}",
            ]
            for counted in (session.agreement if session else ())
        ),
    )


def ttft_at_both_ends(listed_points: Sequence[Point], lab: Lab, summary: Summary) -> Table:
    """Tabulate TTFT from the send on both sides, which transport and tokenizing set apart."""
    rows: list[list[Inline]] = []
    for point in listed_points:
        client_s, engine_s = (
            summary.value(point.key, f"{side}_ttft_mean_s") for side in ("client", "engine")
        )
        if client_s is not None and engine_s is not None:
            gap = number(client_s - engine_s, "s")
            rows.append(
                [point_label(point.key, lab), number(client_s, "s"), number(engine_s, "s"), gap]
            )
    return table(("Point", "Client's mean", "Engine's mean", "Difference"), rows)
