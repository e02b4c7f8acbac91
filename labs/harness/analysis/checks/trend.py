"""Checks that a step took as long at the end of the window as at its beginning.

The load of a closed loop is the same all along, so a trend is the machine's or the engine's. In
waves and in an open loop the requests in decode come and go, so that steps are compared with those
of as many requests. That withholds no verdict: in a window of few waves, or soon after the start of
an open loop, contexts grow along the window, and steps with them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable

import numpy as np
import scipy
from numpy.typing import NDArray

from labs.harness.analysis.checks.expected import Expected, Found
from labs.harness.analysis.measure import Trial
from loadtests.records import RequestRecord

Floats = NDArray[np.float64]
Change = tuple[float, Callable[[], float]]  # of a step's logarithm, and what computes its p

MOST_TREND = 0.2  # by which a step may change along the window
TREND_P = 0.01
TREND_SLICES, LEAST_SLICES, LEAST_GAPS = 10, 8, 3  # of the window; of these filled; gaps in each
MOST_GAPS = 10  # that add to the weight of a part: the streams of a batch share its steps
ALIKE_LOAD = 1.2  # by which the requests in decode may differ where steps are compared
LEAST_APART = 0.2  # of the variance of time, that is left where load is held equal


def unknown_at_constant_load(trial: Trial, _: Expected) -> Found:
    if not _varies(trial) and trial.once(_change) is None:
        yield {}


def unknown_at_varying_load(trial: Trial, _: Expected) -> Found:
    if _varies(trial) and trial.once(_change) is None:
        yield {}


def at_constant_load(trial: Trial, _: Expected) -> Found:
    if not _varies(trial):
        yield from _trend(trial)


def at_varying_load(trial: Trial, _: Expected) -> Found:
    if _varies(trial):
        yield from _trend(trial)


def _trend(trial: Trial) -> Found:
    change = trial.once(_change)
    if change is None:
        return
    log_change, p_of = change
    if abs(log_change) > math.log1p(MOST_TREND) and p_of() < TREND_P:
        yield {"times": math.exp(log_change), "p": TREND_P}


def _varies(trial: Trial) -> bool:
    load = trial.point.load
    return load.open_loop or load.kind in ("waves", "sessions", "lognormal")


def _change(trial: Trial) -> Change | None:
    """Return by how much the logarithm of a step's length changed along the window.

    With it comes what computes its p, which only a large change needs. None where too little of the
    window has steps, and where the load's own change takes work beside the steps, too.
    """
    if trial.point.load.kind in ("ramp", "day"):
        return None
    return _change_at_equal_load(trial) if _varies(trial) else _change_at_constant_load(trial)


def _change_at_constant_load(trial: Trial) -> Change | None:
    times, steps_s = step_times_s(trial)
    if len(times) < LEAST_SLICES:
        return None
    slope = float(scipy.stats.theilslopes(np.log(steps_s), times)[0])
    return (
        slope * trial.window_length_s,
        lambda: float(scipy.stats.kendalltau(times, steps_s).pvalue),
    )


def _change_at_equal_load(trial: Trial) -> Change | None:
    """Return the same change among steps with as many requests in decode, and what computes its p.

    The gaps between chunks are parted by tenths of the window and by the number of requests in
    decode; the median of each part counts as often as it has gaps, up to ten. Fitted are a level
    for each number of requests and one slope over time, whose error comes from leaving out each
    tenth in turn (jackknife). None where too few tenths have parts, or where load and time rose
    together, so that they cannot be told apart.
    """
    parts = _gaps_by_time_and_load(trial)
    gaps_s = {part: found for part, found in parts.items() if len(found) >= LEAST_GAPS}
    tenths = {tenth for tenth, _ in gaps_s}
    if len(tenths) < LEAST_SLICES:
        return None
    times, loads = np.array(list(gaps_s), float).T
    logs = np.log([np.median(found) for found in gaps_s.values()])
    weights = np.array([min(len(found), MOST_GAPS) for found in gaps_s.values()], float)
    table = np.array([times, logs, loads, weights])
    slope = _slope_at_equal_load(*table)
    without_each = [_slope_at_equal_load(*table[:, times != tenth]) for tenth in tenths]
    others = [other for other in without_each if other is not None]
    n = len(tenths)
    if slope is None or len(others) < n:
        return None
    error = math.sqrt((n - 1) * float(np.var(others)))

    def p() -> float:
        return 2 * float(scipy.stats.t.sf(abs(slope) / error, n - 1)) if error else float(not slope)

    return slope * TREND_SLICES, p


def _slope_at_equal_load(
    times: Floats, logs: Floats, loads: Floats, weights: Floats
) -> float | None:
    """Fit a slope over time with a level for each load; None where load and time rose together."""
    of_times, of_logs = (array - _means_of(loads, array, weights) for array in (times, logs))
    spread = float(np.average(of_times**2, weights=weights))
    if spread <= LEAST_APART * float(np.cov(times, aweights=weights, ddof=0)):
        return None
    return float(np.average(of_times * of_logs, weights=weights)) / spread


def _means_of(groups: Floats, values: Floats, weights: Floats) -> Floats:
    """Return for each value the weighted mean of its group."""
    _, group = np.unique(groups, return_inverse=True)
    means: Floats = np.bincount(group, weights * values) / np.bincount(group, weights)
    return means[group]


def _gaps_by_time_and_load(trial: Trial) -> dict[tuple[int, int], list[float]]:
    """Part the gaps between chunks, in seconds, by tenths of the window and by requests in decode.

    The second number is the same where about as many were in decode. A gap whose step computed a
    prompt, too, is left out: a first token came with it, or, in waves, was still to come.
    """
    start, end = trial.summary.window_s
    waves = trial.point.load.kind == "waves"
    decodes = [r for r in trial.records if r.chunks]
    firsts, lasts = (np.sort([r.chunks.times_s[i] for r in decodes]) for i in (0, -1))
    sends = np.sort([r.sent_s for r in decodes])
    ends_s, gaps_s = _gaps(r for r in decodes if r.ok)
    halves_s = gaps_s / 2  # tokens of one step come one after another
    begun, by_then = np.searchsorted(firsts, [ends_s - halves_s, ends_s + halves_s])
    prompts = (np.searchsorted(sends, ends_s) if waves else by_then) - begun
    at_once = np.searchsorted(firsts, ends_s) - np.searchsorted(lasts, ends_s)
    counted = (start <= ends_s) & (ends_s < end) & (gaps_s > 0) & (prompts == 0)
    slices = ((ends_s - start) / (end - start) * TREND_SLICES).astype(int)
    alike = np.rint(np.log(np.maximum(1, at_once)) / math.log(ALIKE_LOAD)).astype(int)
    parts: dict[tuple[int, int], list[float]] = {}
    columns = (column[counted].tolist() for column in (slices, alike, gaps_s))
    for slice_, load, gap_s in zip(*columns, strict=True):
        parts.setdefault((slice_, load), []).append(gap_s)
    return parts


def step_times_s(trial: Trial) -> tuple[list[float], list[float]]:
    """Return (time, length of a step) in seconds along the window, at up to ten moments.

    The length is the median of the gaps between chunks that end in a tenth of the window; a tenth
    with fewer than three is left out. A stream that waits for another's prefill does not move a
    median. Where requests took turns with those of other engines, which leaves tenths of the window
    empty, it is a tenth of the gaps.
    """
    start, end = trial.summary.window_s
    ends_s, gaps_s = _gaps(r for r in trial.streams if r.ok)
    inside = (start <= ends_s) & (ends_s < end) & (gaps_s > 0)
    in_order = np.lexsort([gaps_s[inside], ends_s[inside]])
    ends_s, gaps_s = ends_s[inside][in_order], gaps_s[inside][in_order]
    places = np.arange(len(gaps_s)) / max(1, len(gaps_s))
    shares = places if trial.beside else (ends_s - start) / (end - start)
    slices = [gaps_s[(shares * TREND_SLICES).astype(int) == i] for i in range(TREND_SLICES)]
    filled = [(i, np.median(found)) for i, found in enumerate(slices) if len(found) >= LEAST_GAPS]
    middle_s = [start + (i + 0.5) * (end - start) / TREND_SLICES for i, _ in filled]
    return middle_s, [float(gap_s) for _, gap_s in filled]


def _gaps(of: Iterable[RequestRecord]) -> tuple[Floats, Floats]:
    """Return all gaps between chunks as two columns: when each ends, and its length in seconds."""
    ends_s, gaps_s = array("d"), array("d")
    for record in of:
        ends_s.extend(record.chunks.times_s[1:])
        gaps_s.extend(record.chunk_gaps_s)
    return np.array(ends_s), np.array(gaps_s)
