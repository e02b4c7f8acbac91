"""Reads signals off a trial, and tells how long before a breach of the SLO each gave an alarm.

An operator adds a server, or turns requests away, by a signal that moves before the SLO is broken.
The signals are read from the clients' records: a request waits from its send to its first token,
and is in the batch from then to its last. So they lag the engine's own gauges by some milliseconds
of transport, and a trial in virtual time has them as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from labs.harness.analysis.measure import Trial, kv_capacity_tokens
from loadtests.arrivals import AnyArrival, Day, OfTrace, Ramp

GRID_S = 0.05  # between two readings of a signal
TRAILING_S = 1.0  # over which answers are gathered for the percentile
CALM_S = 2.0  # below its threshold: only then an alarm is over
QUEUE, KV, BATCH, TTFT = "Requests waiting", "KV cache in use", "Batch in use", "TTFT, slowest"
SIGNALS = (QUEUE, BATCH, KV, TTFT)
UNITS = {QUEUE: "1", BATCH: "share", KV: "share", TTFT: "s"}
MOST, OF_TTFT = 0.8, 0.5  # of the batch and of the cache; of what the SLO allows

Series = dict[str, list[float]]  # signal -> its readings, one every GRID_S


class Watched(BaseModel, frozen=True, extra="forbid"):
    """Holds what one signal said in one trial, with the threshold that was set beforehand."""

    crossed_s: float | None  # when the alarm began that the breach fell into
    lead_s: float | None  # from then to the breach; None: no alarm, or none in time
    false_alarms: int  # that were over before the breach, or all where there was none


class Watch(BaseModel, frozen=True, extra="forbid"):
    """Holds when the SLO was broken in a trial, and what each signal had said by then."""

    breach_s: float | None  # when a request had first waited for what the SLO allows; None: never
    signals: dict[str, Watched]


def is_watched(load: AnyArrival) -> bool:
    """Tell whether the rate of a load changes within a trial, so that a signal can lead."""
    return isinstance(load, Ramp | Day | OfTrace)


def late_from_s(trial: Trial) -> float | None:
    """Find when the first request was sent whose first token came later than the SLO allows.

    In seconds from the trial's beginning; None where none was late.
    """
    limit_s = trial.slo.ttft_s
    late_s = (r.start_s for r in trial.answered if (r.ttft_s or 0.0) > limit_s)
    return min(late_s, default=None)


def thresholds(trial: Trial) -> dict[str, float]:
    """Set the thresholds by the engine's own sizes and the SLO, not by what a trial shows.

    As many waiting as a batch has places; most of the batch and of the cache; half of the SLO.
    """
    places = trial.point.flags.max_num_seqs
    return {QUEUE: places, BATCH: MOST, KV: MOST, TTFT: OF_TTFT * trial.slo.ttft_s}


def watch(trial: Trial) -> Watch:
    """Say when each signal reached its threshold, and how long before the breach."""
    sent_s, readings, limits = late_from_s(trial), series(trial), thresholds(trial)
    breach_s = None if sent_s is None else sent_s + trial.slo.ttft_s
    return Watch(
        breach_s=breach_s,
        signals={
            name: watched([v >= limits[name] for v in readings[name]], breach_s) for name in SIGNALS
        },
    )


def watched(above: Sequence[bool], breach_s: float | None) -> Watched:
    """Find the alarm that a breach fell into, among the readings at or above a threshold.

    One that is on at the last reading goes on until a breach that comes after it.
    """
    calm, end = round(CALM_S / GRID_S), len(above) - 1
    alarms: list[tuple[int, int]] = []  # (first, last) reading
    for i in np.flatnonzero(above).tolist():
        if alarms and i - alarms[-1][1] <= calm:
            alarms[-1] = (alarms[-1][0], i)
        else:
            alarms.append((i, i))
    if breach_s is None:
        return Watched(crossed_s=None, lead_s=None, false_alarms=len(alarms))
    at = breach_s / GRID_S
    before = [alarm for alarm in alarms if alarm[0] < at]
    true = [first for first, last in before if last == end or last + calm >= at]
    crossed_s = true[0] * GRID_S if true else None
    return Watched(
        crossed_s=crossed_s,
        lead_s=None if crossed_s is None else breach_s - crossed_s,
        false_alarms=len(before) - len(true),
    )


def series(trial: Trial) -> Series:
    """Read the signals off a trial's records, from its beginning to the end of its window."""
    point, (_, end_s) = trial.point, trial.summary.window_s
    grid = np.arange(0.0, end_s, GRID_S)
    waiting, batch, held = (np.zeros(len(grid)) for _ in range(3))
    firsts: list[tuple[float, float]] = []  # (when, TTFT)
    for r in trial.records:
        if not r.chunks:
            continue
        first_s, last_s = r.chunks[0][0], r.chunks[-1][0]
        waiting += (grid >= r.sent_s) & (grid < first_s)
        running = (grid >= first_s) & (grid < last_s)
        batch += running
        times, sizes = zip(*r.chunks, strict=True)
        received = np.concatenate([[0], np.cumsum(sizes)])
        so_far = received[np.searchsorted(times, grid, side="right")]
        held += running * ((r.prompt_tokens or 0) + so_far)
        firsts.append((first_s, r.ttft_s or 0.0))
    firsts.sort()
    slowest = [
        max((ttft_s for at, ttft_s in firsts if t - TRAILING_S < at <= t), default=0.0)
        for t in grid
    ]
    capacity = kv_capacity_tokens(trial)
    return {
        QUEUE: waiting.tolist(),
        BATCH: (batch / point.flags.max_num_seqs).tolist(),
        KV: (held / capacity).tolist() if capacity else [0.0] * len(grid),
        TTFT: slowest,
    }
