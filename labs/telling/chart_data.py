"""Gather what the page of a run draws: figures, samples and requests, small enough to embed."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from dashboards.palette import BOUND, VARIANTS
from labs.filing.results import Run, RunFolder, Summary, TrialResult
from labs.judging.judge import Interval, borne_out_between
from labs.judging.measure import Trial
from labs.judging.metrics import METRICS, Metric, by_repeat, columns
from labs.judging.text import claim_outcome, outcome_text, point_label, verdict_text
from labs.lab import Lab, Point, Prediction
from labs.telling.document import parse, plain_text
from loadtests.latencies import CHUNK_GAP, E2E, ITL, TPOT, TTFT, Latency
from loadtests.records import RequestRecord
from serving import metrics

DRAWN = (TTFT, TPOT, ITL, E2E, CHUNK_GAP)  # of which a reader may look at every sample
MOST_QUANTILES = 250
MOST_REQUESTS = 12_000  # on one page, which stays under a megabyte beside the library
MOST_OF_A_SITE = 40_000  # on all its pages together, which take about two megabytes

Samples: TypeAlias = "dict[str, array[float]]"  # point -> samples in seconds


def data(
    folder: RunFolder, run: Run, summary: Summary, most_requests: int | None = None
) -> dict[str, Any]:
    """Gather all that a page draws: times in ms, or in 0.1 ms where the name ends in `_dms`."""
    lab, points = run.rebuilt_lab(), run.points()
    samples, trials = _played(
        folder, points, lab, min(MOST_REQUESTS, most_requests or MOST_REQUESTS)
    )
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
        "points": [
            {
                "key": p.key,
                "name": point_label(p.key, lab),
                "variant": p.variant.name,
                "workload": p.workload.name,
                "kind": p.load.kind,
                "level": str(p.load).partition(":")[2],
                "load": p.load.words,
                "figures": {n: _over_repeats(summary, p, n) for n in figures},
                "predicted": {
                    f.metric: {"value": _round(f.prediction.value), "kind": f.prediction.kind}
                    for f in summary.forecasts
                    if f.point == p.key
                },
                "in_virtual_time": {
                    f.metric: {end: _round(getattr(f, end)) for end in ("value", "low", "high")}
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


def _over_repeats(summary: Summary, point: Point, metric: str) -> dict[str, Any] | None:
    """Return a point's figure with its interval, and the value of each repeat."""
    interval = summary.figure(point.key, metric)
    if interval is None:
        return None
    each = by_repeat(summary.measurements.get(point.key, {}), metric).values()
    pooled = METRICS[metric].statistic.pooled
    return {**_interval(interval), "each": [_round(v) for v in each], "pooled": pooled}


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
    folder: RunFolder, points: list[Point], lab: Lab, most_requests: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the quantiles of each latency and the requests of each trial, read one by one."""
    seconds: dict[Latency, Samples] = {latency: {} for latency in DRAWN}
    long: Samples = {}
    played = sum(
        folder.trial_result(p, repeat) is not None
        for p in points
        for repeat in range(1, lab.rounds + 1)
    )
    rows: list[dict[str, Any]] = []
    for point, result, trial in folder.trials(points, lab):
        for latency, of_points in seconds.items():
            drawn = trial.samples_s(latency) if trial else []
            of_points.setdefault(point.key, array("d")).extend(drawn)
        waits = [r.ttft_s for r in trial.intruders] if trial else []
        long.setdefault(point.key, array("d")).extend(w for w in waits if w is not None)
        rows.append(_requests(point, result, trial, max(1, most_requests // played)))
        del trial  # before the next one is read
    samples = {
        latency.attribute: {"title": latency.title, "points": _quantiles(of_points)}
        for latency, of_points in seconds.items()
    }
    samples["intruder_ttft_s"] = {"title": "TTFT of the long prompts", "points": _quantiles(long)}
    return {name: of for name, of in samples.items() if of["points"]}, rows


def _quantiles(points: Samples) -> dict[str, Any]:
    """Return how many samples each point has, and their quantiles in equal steps."""
    return {
        key: {
            "n": len(drawn),
            "ms": [
                round(1000 * float(v), 2)
                for v in np.quantile(drawn, np.linspace(0, 1, min(len(drawn), MOST_QUANTILES)))
            ],
        }
        for key, drawn in points.items()
        if drawn
    }


def _requests(point: Point, result: TrialResult, trial: Trial | None, most: int) -> dict[str, Any]:
    """Return the requests of a trial by column; where there are more than `most`, the longest."""
    identity: dict[str, Any] = {"point": point.key, "repeat": result.repeat}
    if trial is None:
        return {**identity, "failed": result.failed or "no summary"}
    shown = heapq.nlargest(most, trial.records, key=_length_s)
    shown.sort(key=lambda r: r.start_s)
    histograms = trial.engine.histograms if trial.engine else {}
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
        **_columns(shown),
        "long": [i for i, r in enumerate(shown) if point.workload.is_intruder(r.index)],
        "errors": {i: r.error[:300] for i, r in enumerate(shown) if r.error},
    }


def _length_s(record: RequestRecord) -> float:
    """Return the time from start to last token; infinite where none came."""
    return float("inf") if record.e2e_s is None else record.e2e_s


def _columns(shown: Sequence[RequestRecord]) -> dict[str, list[int | None]]:
    """Return the requests' columns: times in 0.1 ms, all but the start counted from it."""

    def since_start(times: Sequence[float | None]) -> list[int | None]:
        return [
            None if t is None else _dms(t - r.start_s) for t, r in zip(times, shown, strict=True)
        ]

    return {
        "index": [r.index for r in shown],
        "start_dms": [_dms(r.start_s) for r in shown],
        "sent_dms": since_start([r.sent_s for r in shown]),
        "first_dms": since_start([r.chunks[0][0] if r.chunks else None for r in shown]),
        "last_dms": since_start([r.chunks[-1][0] if r.chunks else r.end_s for r in shown]),
        "gap_dms": [_dms(max(r.chunk_gaps_s)) if len(r.chunks) > 1 else None for r in shown],
        "prompt": [r.prompt_tokens for r in shown],
        "output": [r.output_tokens for r in shown],
        "tpot_dms": [None if r.tpot_s is None else _dms(r.tpot_s) for r in shown],
        "counted": [int(r.in_window and r.ok) for r in shown],
    }


def _dms(seconds: float) -> int:
    return round(10_000 * seconds)
