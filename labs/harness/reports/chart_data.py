"""Gather what the page of a run draws: figures, samples and requests, small enough to embed."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dashboards.palette import BOUND, VARIANTS
from labs.harness.analysis.computed import Summary
from labs.harness.analysis.measure import Trial
from labs.harness.analysis.metrics import METRICS, Metric, by_repeat, columns, shown_first
from labs.harness.analysis.text import claim_outcome, outcome_text, point_label, verdict_text
from labs.harness.analysis.verdicts import Interval, borne_out_between
from labs.harness.reports.document import parse, plain_text
from labs.harness.spec.lab import Lab, Point, Prediction
from labs.harness.storage.recorded import Run, TrialResult
from labs.harness.storage.results import RunFolder
from loadtests.latencies import CHUNK_GAP, E2E, ITL, TPOT, TTFT
from loadtests.records import RequestRecord
from serving import metrics

DRAWN = (TTFT, TPOT, ITL, E2E, CHUNK_GAP)  # of which a reader may look at every sample
LONG, LONG_TITLE = "intruder_ttft_s", "TTFT of the long prompts"
COLUMNS = (  # of a trial's requests
    "index", "start_dms", "sent_dms", "first_dms", "last_dms", "gap_dms", "prompt", "output",
    "tpot_dms", "counted",
)  # fmt: skip
MOST_QUANTILES = 100  # of one latency at one point
LEAST_REQUESTS = 3  # of a trial: its longest


REQUESTS_OF_A_PAGE, REQUESTS_OF_A_SITE = 12_000, 8_000  # that a page draws, and all of a site


def data(
    folder: RunFolder, run: Run, summary: Summary, most_requests: int = REQUESTS_OF_A_PAGE
) -> dict[str, Any]:
    """Gather all that a page draws: times in ms, or in 0.1 ms where the name ends in `_dms`.

    A figure is a list: its value, the ends of its interval, and the value of each repeat; of a
    forecast, its value and its band.
    """
    lab, points = run.rebuilt_lab(), run.points()
    errors: dict[str, int] = {}  # what went wrong, each text once
    samples, trials = _played(folder, points, lab, most_requests, errors)
    figures = _figure_names(lab, summary)
    return {
        "colours": VARIANTS,
        "predicted": BOUND,
        "variants": [v.name for v in lab.variants],
        "workloads": [w.name for w in lab.workloads],
        "slo": {
            TTFT.attribute: lab.slo.ttft_s, TPOT.attribute: lab.slo.tpot_s,
            ITL.attribute: lab.slo.itl_s, CHUNK_GAP.attribute: lab.slo.itl_s,
        },
        "metrics": {n: _described(METRICS[n]) for n in figures},
        "shown_first": [n for n in shown_first() if n in figures],
        "points": [
            {
                "key": p.key,
                "name": point_label(p.key, lab),
                "variant": p.variant.name,
                "workload": p.workload.name,
                "kind": p.load.kind,
                "level": str(p.load).partition(":")[2],
                "load": p.load.words,
                "figures": {n: f for n in figures if (f := _over_repeats(summary, p, n))},
                "predicted": {
                    f.metric: {"value": _round(f.prediction.value), "kind": f.prediction.kind}
                    for f in summary.forecasts
                    if f.point == p.key
                },
                "in_virtual_time": {
                    f.metric: [_round(v) for v in (f.value, f.low, f.high)]
                    for f in summary.in_virtual_time
                    if f.point == p.key
                },
            }
            for p in points
        ],
        "claims": _claims(lab, summary),
        "forecasts": _forecasts(lab, summary),
        "samples": samples,
        "trials": trials,
        "columns": COLUMNS,
        "errors": list(errors),
    }  # fmt: skip


def _figure_names(lab: Lab, summary: Summary) -> list[str]:
    """Return the metrics that any trial has, those of the lab's claims first."""
    rows = [row for repeats in summary.measurements.values() for row in repeats.values()]
    wanted = [*(c.metric for c in lab.claims), *(f.metric for f in lab.forecasts), *columns()]
    return [n for n in dict.fromkeys(wanted) if any(row.get(n) is not None for row in rows)]


def _described(metric: Metric) -> dict[str, str | None]:
    """Describe a metric, with the name under which the page has its samples."""
    latency = metric.statistic.latency
    return {
        "title": metric.title,
        "unit": metric.unit,
        "samples": latency.attribute if latency else None,
    }


def _over_repeats(summary: Summary, point: Point, metric: str) -> list[float | None] | None:
    """Return a point's figure, the ends of its interval, and the value of each repeat."""
    interval = summary.figure(point.key, metric)
    if interval is None:
        return None
    each = by_repeat(summary.measurements.get(point.key, {}), metric).values()
    ends = (interval.value, interval.low, interval.high)
    return [*map(_round, ends), *(float(f"{value:.3g}") for value in each)]


def _interval(interval: Interval | None) -> dict[str, float | None]:
    return {
        "value": _round(interval.value if interval else None),
        "low": _round(interval.low if interval else None),
        "high": _round(interval.high if interval else None),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _claims(lab: Lab, summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "title": plain_text(parse(j.title)),
            "metric": j.metric,
            "where": f"{METRICS[j.metric].title}:"
            f" {point_label(j.treatment, lab)} / {point_label(j.baseline, lab)}",
            "point": j.treatment,
            **_interval(j.ratio),
            "predicted": _round(j.prediction.value),
            **_borne_out(j.prediction),
            "verdict": f"{plain_text(parse(verdict_text(j)))}; prediction: {claim_outcome(j)}",
            "valid": j.outcome != "not valid",
        }
        for j in summary.judgements
    ]


def _forecasts(lab: Lab, summary: Summary) -> list[dict[str, Any]]:
    """Return each forecast's measured value as a multiple of the predicted one."""
    rows = []
    for f in summary.forecasts:
        rows.append(
            {
                "title": f"{METRICS[f.metric].title}: {point_label(f.point, lab)}",
                "where": "",
                **_interval(f.share),
                "predicted": 1,
                **_borne_out(f.prediction.model_copy(update={"value": 1})),
                "verdict": f"prediction: {outcome_text(f.outcome, f.prediction, f.measured)}",
                "valid": True,
            }
        )
    return rows


def _borne_out(prediction: Prediction) -> dict[str, float | None]:
    """Return between which ratios the prediction is borne out; None where there is no end."""
    least, largest = borne_out_between(prediction)
    return {
        "least": _round(least) if math.isfinite(least) else None,
        "largest": _round(largest) if math.isfinite(largest) else None,
    }


def _played(
    folder: RunFolder, points: list[Point], lab: Lab, most_requests: int, errors: dict[str, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the quantiles of each latency and the requests of each trial, read one by one."""
    titles = {**{latency.attribute: latency.title for latency in DRAWN}, LONG: LONG_TITLE}
    drawn: dict[str, dict[str, Any]] = {name: {} for name in titles}
    most_by_trial = _shared_out(_sent(folder, points, lab), most_requests)
    rows: list[dict[str, Any]] = []
    for point in points:
        seconds = {name: array("d") for name in titles}
        for _, result, trial in folder.trials([point], lab):
            if trial:
                for latency in DRAWN:
                    seconds[latency.attribute].extend(trial.samples_s(latency))
                waits = (r.ttft_s for r in trial.intruders)
                seconds[LONG].extend(w for w in waits if w is not None)
            most = most_by_trial.get((point.key, result.repeat), LEAST_REQUESTS)
            rows.append(_requests(point, result, trial, most, errors))
            del trial  # before the next one is read
        for name, samples_s in seconds.items():
            if samples_s:
                drawn[name][point.key] = _quantiles(samples_s)
    titled = ((name, {"title": titles[name], "points": of}) for name, of in drawn.items() if of)
    return dict(titled), rows


def _sent(folder: RunFolder, points: list[Point], lab: Lab) -> dict[tuple[str, int], int]:
    """Return how many requests each trial has sent, by point and repeat."""
    trial_results = {
        (point.key, repeat): folder.trial_result(point, repeat)
        for point in points
        for repeat in range(1, lab.rounds + 1)
    }
    return {name: of.summary.sent for name, of in trial_results.items() if of and of.summary}


def _shared_out(sent: Mapping[tuple[str, int], int], most: int) -> dict[tuple[str, int], int]:
    """Share out how many requests of each trial are shown.

    Where there is room, the first repeat of each point is shown whole: on a timeline of chosen
    requests alone nobody sees how a batch fills.
    """
    first = sum(count for (_, repeat), count in sent.items() if repeat == 1)
    later = sum(sent.values()) - first
    of_first = min(1.0, most / first) if first else 1.0
    of_later = min(1.0, max(0, most - first) / later) if later else 1.0
    return {
        (key, repeat): max(LEAST_REQUESTS, round(count * (of_first if repeat == 1 else of_later)))
        for (key, repeat), count in sent.items()
    }


def _quantiles(samples_s: array[float]) -> dict[str, Any]:
    """Return how many samples a point has, and their quantiles in equal steps.

    The least and the largest sample are the first and the last of them.
    """
    steps = np.linspace(0, 1, min(len(samples_s), MOST_QUANTILES))
    return {
        "n": len(samples_s),
        "ms": [_round(1000 * float(v)) for v in np.quantile(samples_s, steps)],
    }


def _went_wrong(error: str, turned_away: bool) -> str:
    """Say why a request has no answer; what a limit refused, without the engine's whole message."""
    if turned_away:
        return f"turned away: {error.partition(':')[0]}"
    return error[:300]


def _requests(
    point: Point, result: TrialResult, trial: Trial | None, most: int, errors: dict[str, int]
) -> dict[str, Any]:
    """Return the requests of a trial by column; where there are more than `most`, the longest.

    What went wrong is a place among all `errors`; the columns are those of `COLUMNS`.
    """
    identity: dict[str, Any] = {"point": point.key, "repeat": result.repeat}
    if trial is None:
        return {**identity, "failed": result.failed or "no summary"}
    records = heapq.nlargest(most, trial.records, key=_length_s)
    records.sort(key=lambda r: r.start_s)
    histograms = trial.engine.histograms if trial.engine else {}
    long = [i for i, r in enumerate(records) if point.workload.is_intruder(r.index)]
    refused = {id(r) for r in trial.turned_away}
    failed = {
        i: errors.setdefault(_went_wrong(r.error, id(r) in refused), len(errors))
        for i, r in enumerate(records)
        if r.error
    }
    return {
        **identity,
        "window_s": [round(t, 3) for t in trial.summary.window_s],
        "sent": len(trial.records),
        "engine_ms": [
            _round(1000 * mean)
            if (h := histograms.get(name)) and (mean := h.mean()) is not None
            else None
            for name in (metrics.QUEUE_TIME, metrics.PREFILL_TIME, metrics.DECODE_TIME)
        ],
        "open_loop": point.load.open_loop,
        "shown": len(records),
        "columns": [_packed(name, column) for name, column in _columns(records).items()],
        **({"long": long} if long else {}),
        **({"errors": failed} if failed else {}),
    }


def _length_s(record: RequestRecord) -> float:
    """Return the time from start to last token; infinite where none came."""
    return float("inf") if record.e2e_s is None else record.e2e_s


def _columns(records: Sequence[RequestRecord]) -> dict[str, list[int | None]]:
    """Return the requests' columns: times in 0.1 ms, all but the start counted from it.

    They are those of `COLUMNS`, in its order.
    """

    def since_start(times: Sequence[float | None]) -> list[int | None]:
        return [
            None if t is None else _dms(t - r.start_s) for t, r in zip(times, records, strict=True)
        ]

    return {
        "index": [r.index for r in records],
        "start_dms": [_dms(r.start_s) for r in records],
        "sent_dms": since_start([r.sent_s for r in records]),
        "first_dms": since_start([r.chunks[0][0] if r.chunks else None for r in records]),
        "last_dms": since_start([r.chunks[-1][0] if r.chunks else r.end_s for r in records]),
        "gap_dms": [_dms(max(r.chunk_gaps_s)) if len(r.chunks) > 1 else None for r in records],
        "prompt": [r.prompt_tokens for r in records],
        "output": [r.output_tokens for r in records],
        "tpot_dms": [None if r.tpot_s is None else _dms(r.tpot_s) for r in records],
        "counted": [int(r.in_window and r.ok) for r in records],
    }


def _packed(name: str, column: list[int | None]) -> list[int | None] | int | None:
    """Write a column of one value as that, and numbers in a row as their first."""
    first = column[0] if column else None
    if name == "index" and first is not None:
        return first if column == list(range(first, first + len(column))) else column
    return first if column and len(set(column)) == 1 else column


def _dms(seconds: float) -> int:
    return round(10_000 * seconds)
