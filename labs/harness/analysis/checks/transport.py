"""Checks that the client's TTFT is the engine's, and what transport and tokenizing take."""

from __future__ import annotations

import math

import numpy as np

from labs.harness.analysis.checks.expected import TOKENIZE_S, TRANSPORT_S, Expected, Found
from labs.harness.analysis.measure import (
    Trial,
    client_ttft_mean_s,
    counter_increase,
    engine_ttft_mean_s,
)
from labs.harness.spec.lab import Point
from serving import metrics
from serving.metrics import Histogram

TTFT_APART_S, TTFT_APART_SHARE = 0.010, 0.05  # client's mean beyond the engine's: the larger


def other_requests_counted(trial: Trial, _: Expected) -> Found:
    """Find a histogram of TTFT that cannot be of the trial's requests.

    Where it counts as many as the engine's counter of requests, that counter is told instead.
    """
    histogram = _histogram(trial)
    if histogram is None or _failed_in(trial, histogram) is not None:
        return
    if histogram.count != counter_increase(trial, metrics.REQUESTS):
        yield {"counted": histogram.count, "answered": len(trial.answered)}


def ttft_differs(trial: Trial, expected: Expected) -> Found:
    """Compare the client's mean TTFT with the engine's.

    The engine's covers any part of the requests that failed. Of each of those the client only knows
    that its first token cannot have taken longer than it waited, so the mean over the others lies
    between two bounds.
    """
    histogram, client_s = _histogram(trial), client_ttft_mean_s(trial)
    if histogram is None or client_s is None:
        return
    failed = _failed_in(trial, histogram)
    if failed is None:
        return
    waits_s = sorted((r.over_s - r.sent_s for r in trial.failed), reverse=True)
    low_s = (histogram.sum - sum(waits_s[:failed])) / len(trial.answered)
    high_s = histogram.sum / len(trial.answered)
    each_s = expected.transport_s.get(trial.point.variant.name, TRANSPORT_S)
    more_s = _queued_s(trial, each_s) + _tokenizing_s(trial)
    apart_s = max(TTFT_APART_S, TTFT_APART_SHARE * high_s)
    if not low_s - apart_s <= client_s <= high_s + more_s + apart_s:
        engine_ms = f"{1000 * high_s:.1f}"
        if failed:
            engine_ms = f"between {1000 * max(0.0, low_s):.1f} and {engine_ms}"
        yield {"client_ms": 1000 * client_s, "engine_ms": engine_ms, "apart_ms": 1000 * apart_s}


def _histogram(trial: Trial) -> Histogram | None:
    """Return the engine's histogram of TTFT; one that is missing is named by another check."""
    return trial.engine.histograms.get(metrics.TTFT) if trial.engine else None


def _failed_in(trial: Trial, histogram: Histogram) -> int | None:
    """Return how many failed requests it counts; None where it counts others than were sent."""
    failed = round(histogram.count) - len(trial.answered)
    return failed if 0 <= failed <= len(trial.failed) else None


def _tokenizing_s(trial: Trial) -> float:
    """Estimate how long the mean prompt of a trial takes to be tokenized."""
    return TOKENIZE_S * float(np.mean([r.prompt_tokens or 0 for r in trial.answered]))


def _queued_s(trial: Trial, each_s: float) -> float:
    """Return how long transport takes in the mean, where it takes `each_s` of a request alone.

    One process of the server takes requests in, one after another, so those that are sent together
    wait for each other. TRANSPORT_S at most.
    """
    sends_s = sorted(r.sent_s for r in trial.records if not r.choice)
    took_s, free_s = 0.0, -math.inf
    for sent_s in sends_s:
        free_s = max(sent_s, free_s) + each_s
        took_s += free_s - sent_s
    return min(TRANSPORT_S, took_s / len(sends_s))


def is_one_stream(point: Point) -> bool:
    """Tell whether a point has no more than one answer under way at a time."""
    return point.load.kind in ("concurrent", "waves") and point.sequences == 1


def transport_s(one_stream: Trial) -> float | None:
    """Measure how long transport takes, in a trial at one stream, in seconds.

    It is what the client's mean TTFT has beyond the engine's and beyond tokenizing. None where the
    two are not of the same requests.
    """
    engine_s, client_s = engine_ttft_mean_s(one_stream), client_ttft_mean_s(one_stream)
    histogram = _histogram(one_stream)
    if not engine_s or not client_s or not histogram:
        return None
    whole = histogram.count == len(one_stream.records) and not one_stream.failed
    return client_s - engine_s - _tokenizing_s(one_stream) if whole else None
