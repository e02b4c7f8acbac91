"""Finds what is wrong with a trial or a comparison: caveats, each with a name and advice.

A caveat that blocks allows no verdict. Two kinds of faults are told apart. A **disturbance** may be
gone in another attempt: a late client, another process, an engine that slows down. A fault of the
**set-up** would be there again: a treatment that the engine does not show, answers of another
length. What a check needs and cannot read blocks too, by name: missing evidence proves nothing.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import BaseModel

from labs.harness.judging import dose
from labs.harness.judging.judge import Caveat
from labs.harness.judging.machine_speed import (
    MOST_CHANGED,
    TimedTrial,
    jump,
    large_jump,
    machine_speed,
)
from labs.harness.judging.measure import (
    Trial,
    client_ttft_mean_s,
    engine_ttft_mean_s,
    expected_pieces,
    ran_out,
)
from labs.harness.judging.metrics import METRICS, Repeats, by_repeat
from labs.harness.judging.text import counted, literal, number
from labs.harness.spec import Claim, Evidence, Point, factors
from loadtests.plan import LEAST_COUNTED
from loadtests.records import RequestRecord
from loadtests.structures import begins_so
from serving import metrics, random_weights, telemetry
from serving.engines import DEFAULT_ENGINE, ENGINES
from serving.telemetry import POWER_CAP, SLOWDOWNS

Floats = NDArray[np.float64]

LATE_S, LATE_SHARE = 0.005, 0.05  # a send counts as late beyond both
MOST_LATE = 0.05
MOST_LOOP_LAG_S = 0.02  # at the 99th percentile
MOST_LOOP_LAG_ONCE_S, MOST_LOOP_LAG_ITLS = 0.05, 2.0  # at worst: the larger of the two
MOST_ERRORS = 0.01
LEAST_ACHIEVED = 0.95
MOST_SEVERAL = 0.05  # share of chunks with several tokens, without speculation
MOSTLY_SEVERAL = 0.5  # beyond this share the times of single tokens are unknown
TOKEN_TIMES = tuple(name for name, metric in METRICS.items() if metric.token_times)
MOST_SLOWED = 0.01  # share of the window; one sample can be a change of load
MOST_CAPPED = 0.5
MOST_STEAL = 0.02  # share of all CPU time
MOST_OTHERS = 0.05  # of the CPU time that the engine uses
MOST_SERVER = 0.9  # of one core; beyond, requests and chunks wait for it
LEAST_OTHERS_CORES = 0.01  # of the CPU time of one core: less is a tick or two of its clock
LEAST_OTHERS = 0.005  # of all CPU time, where the number of cores was not recorded
MOST_TREND = 0.2  # by which a step may change along the window
TREND_P = 0.01
TREND_SLICES, LEAST_SLICES, LEAST_GAPS = 10, 8, 3  # of the window; of these filled; gaps in each
MOST_GAPS = 10  # that add to the weight of a part: the streams of a batch share its steps
ALIKE_LOAD = 1.2  # by which the requests in decode may differ where steps are compared
LEAST_APART = 0.2  # of the variance of time, that is left where load is held equal
OTHER_TOKENIZER = 0.05  # by which an endpoint's count of a prompt's tokens may differ
TTFT_APART_S, TTFT_APART_SHARE = 0.010, 0.05  # client's mean beyond the engine's: the larger
SPEED_JUMPED = "the machine's speed jumped"
SERVER_BUSY = "API server busy"
TOKENIZE_S = 3e-6  # per token, with a fast tokenizer on one core
TRANSPORT_S = 0.010  # at most: HTTP and templating, before the engine's clock starts


class Served(BaseModel, frozen=True, extra="forbid"):
    """The weights that a variant's engine must say it loaded.

    `files_sha256` is over the hashes of the files in their folder; `quantized` tells whether their
    configuration names a method of quantization, `random` whether the engine draws them itself and
    has to say how many are zero.
    """

    files_sha256: str
    quantized: bool
    random: bool = False  # so in old runs, too


@dataclass(frozen=True)
class Expected:
    """Holds what a run's trials must show. An old run recorded less, and must show less."""

    evidence: Sequence[Evidence] = ()
    endpoint: bool = False  # it was neither started nor configured by the lab
    metrics_read: bool = True  # False: from the start, the endpoint showed no metrics
    on_gpus: bool = False  # of this machine, and a GPU whose state cannot be read is to be named
    gpu_part: bool = False  # these are parts of a GPU (MIG, vGPU), which often do not show it
    model: str = ""  # the name under which the base model answers; empty where it is not known
    template_tokens: int | None = None  # the most that the chat template puts before every text
    served: Mapping[str, Served] = field(default_factory=dict)  # by variant
    acceptance: Mapping[str, float] = field(default_factory=dict)  # by point: of a drafted token
    least_copied: Mapping[str, float] = field(default_factory=dict)  # by point: share accepted
    # by variant, of those measured at one stream: what transport adds to the engine's TTFT
    transport_s: Mapping[str, float] = field(default_factory=dict)
    least_hit_rate: Mapping[str, float] = field(default_factory=dict)  # by point, as was forecast
    least_found: Mapping[str, Sequence[int]] = field(default_factory=dict)  # after each request

    def with_transport(self, found_s: Mapping[str, Mapping[tuple[str, int], float]]) -> Expected:
        """Expect what transport usually took in these trials of each variant, at one stream."""
        usual_s = {
            variant: usual_transport_s([*of.values()]) for variant, of in found_s.items() if of
        }
        return replace(self, transport_s=usual_s)


def caveats_of(trial: Trial, expected: Expected) -> list[Caveat]:
    """List what is wrong with one trial; the evidence may include that of other variants."""
    return [*disturbances_of(trial, expected), *faults_of_set_up(trial, expected)]


def disturbances_of(trial: Trial, expected: Expected) -> list[Caveat]:
    """List what may be otherwise in another attempt at this trial."""
    caveats = [*_errors(trial), *_lost(trial)]
    if trial.measured_requests:
        for check in (_sent, _late_loop, _counted_alike, _throttled, _trend):
            caveats += check(trial)
        caveats += _ttft_apart(trial, expected)
    return [*caveats, *_other_work(trial, expected), *_unreadable(trial, expected)]


def faults_of_set_up(trial: Trial, expected: Expected) -> list[Caveat]:
    """List what would be the same in another attempt at this trial."""
    if not trial.measured_requests:
        text = "no request was sent and answered within the window: widen it"
        return [_caveat(trial, "nothing measured", text)]
    return [
        *_exhausted(trial),
        *_too_few(trial),
        *_unseen_hardware(trial, expected),
        *_server_busy(trial, expected),
        *_answered(trial, expected),
        *_treated(trial, expected),
    ]


def _caveat(
    trial: Trial, name: str, text: str, blocks: bool = True, metrics: tuple[str, ...] = ()
) -> Caveat:
    return Caveat(name=name, text=text, blocks=blocks, point=trial.point.key, metrics=metrics)


# -------------------------------------------------------------------------------- disturbances


def _errors(trial: Trial) -> Iterator[Caveat]:
    if errors := [r.error or "" for r in trial.failed]:
        share = len(errors) / len(trial.records)
        count = f"{len(errors)} of {len(trial.records)} requests failed"
        text = f"{count}, the first with: {literal(errors[0])}"
        yield _caveat(trial, "errors", text, share > MOST_ERRORS)


def _lost(trial: Trial) -> Iterator[Caveat]:
    if trial.summary.lost_share:
        yield _caveat(
            trial,
            "load process lost",
            f"one of the load processes died, and {trial.summary.lost_share:.0%} of the users with"
            " it: the requests that are missing are not a random part",
        )


def _sent(trial: Trial) -> Iterator[Caveat]:
    """Check that the generator sent what was due, when it was due."""
    summary = trial.summary
    lags = [(r.send_lag_s or 0.0, r.ttft_s or 0.0) for r in trial.measured_requests]
    late = sum(lag > max(LATE_S, LATE_SHARE * ttft) for lag, ttft in lags) / len(lags)
    if late > MOST_LATE:
        yield _caveat(
            trial,
            "generator lagged",
            f"{late:.0%} of the requests were sent late: lower the rate or add client cores",
        )
    cut = summary.exhausted  # where the requests, or the trace, ended
    if summary.planned and not cut and summary.sent < LEAST_ACHIEVED * summary.planned:
        yield _caveat(
            trial,
            "fell behind the schedule",
            f"{summary.sent} of {summary.planned} scheduled requests were sent: this was no longer"
            " an open loop; lower the rate",
        )


def _late_loop(trial: Trial) -> Iterator[Caveat]:
    """Check that the generator's event loop ran on time, at its 99th percentile and at worst."""
    summary, itl_s = trial.summary, METRICS["itl_p50_s"].of(trial) or 0.0
    most_s = max(MOST_LOOP_LAG_ONCE_S, MOST_LOOP_LAG_ITLS * itl_s)
    if summary.loop_lag_p99_s > MOST_LOOP_LAG_S:
        lag = f"{1000 * summary.loop_lag_p99_s:.0f} ms late (p99)"
    elif summary.loop_lag_max_s > most_s:
        lag = f"{1000 * summary.loop_lag_max_s:.0f} ms late once (at most {1000 * most_s:.0f} ms)"
    else:
        return
    text = f"its event loop ran {lag}, so times are as uncertain: free a CPU core for it"
    yield _caveat(trial, "generator's loop lagged", text)


def _counted_alike(trial: Trial) -> Iterator[Caveat]:
    """Check that client and engine agree on requests and tokens: no other client used the engine.

    Where requests failed, the engine may have counted any part of them.
    """
    if trial.engine is None:
        return
    completed = trial.answered
    failed = len(trial.failed)
    for what, metric, by_client, of_failed in (
        ("requests", metrics.REQUESTS, len(completed), failed),
        (
            "prompt tokens",
            metrics.PROMPT_TOKENS,
            sum(r.prompt_tokens or 0 for r in completed),
            max((r.prompt_tokens or 0 for r in completed), default=0) * failed,
        ),
        (
            "output tokens",
            metrics.GENERATION_TOKENS,
            sum(r.output_tokens or 0 for r in completed),
            sum(r.asked_tokens for r in trial.failed),
        ),
    ):
        by_engine = trial.engine.values.get(metric)
        if by_engine is not None and not by_client <= by_engine <= by_client + of_failed:
            yield _caveat(
                trial,
                "client and engine disagree",
                f"the engine counts {by_engine:.0f} {what}, the client {by_client}: was another"
                " client using it?",
            )


def _ttft_apart(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that the client's mean TTFT is the engine's, and what transport and tokenizing take.

    The engine's covers any part of the requests that failed. Of each of those the client only knows
    that its first token cannot have taken longer than it waited, so the mean over the others lies
    between two bounds.
    """
    if not (trial.engine and (histogram := trial.engine.histograms.get(metrics.TTFT))):
        return  # named where the engine's metrics are checked
    answered, client_s = trial.answered, client_ttft_mean_s(trial)
    of_failed = round(histogram.count) - len(answered)
    if not 0 <= of_failed <= len(trial.failed):
        if histogram.count != trial.engine.values.get(metrics.REQUESTS):  # else the counts say it
            text = (
                f"its histogram of TTFT counts {histogram.count:.0f} requests, and"
                f" {len(answered)} were answered"
            )
            yield _caveat(trial, "engine's metrics incomplete", text)
        return
    if client_s is None:
        return
    waits_s = sorted((r.over_s - r.sent_s for r in trial.failed), reverse=True)
    low_s = (histogram.sum - sum(waits_s[:of_failed])) / len(answered)
    high_s = histogram.sum / len(answered)
    each_s = expected.transport_s.get(trial.point.variant.name, TRANSPORT_S)
    more_s = _queued_s(trial, each_s) + _tokenizing_s(trial)
    apart_s = max(TTFT_APART_S, TTFT_APART_SHARE * high_s)
    if not low_s - apart_s <= client_s <= high_s + more_s + apart_s:
        engine = f"{1000 * high_s:.1f}"
        if of_failed:
            engine = f"between {1000 * max(0.0, low_s):.1f} and {engine}"
        yield _caveat(
            trial,
            "TTFT differs",
            f"mean TTFT is {1000 * client_s:.1f} ms at the client and {engine} ms in the engine:"
            f" the generator or the network adds more than {1000 * apart_s:.0f} ms to what"
            " transport and tokenizing take",
        )


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
    histogram = one_stream.engine and one_stream.engine.histograms.get(metrics.TTFT)
    if not engine_s or not client_s or not histogram:
        return None
    whole = histogram.count == len(one_stream.records) and not one_stream.failed
    return client_s - engine_s - _tokenizing_s(one_stream) if whole else None


def undisturbed_transport_s(
    trial: Trial, timed: TimedTrial | None, expected: Expected
) -> float | None:
    """Measure how long transport takes as `transport_s` does, if nothing disturbed the trial.

    None for more than one stream, too. Whether it was disturbed is judged without what transport
    took in others, so that their order does not matter.
    """
    if not is_one_stream(trial.point) or (timed and speed_jumped_within(timed)):
        return None
    alone = replace(expected, transport_s={})
    disturbed = any(caveat.blocks for caveat in disturbances_of(trial, alone))
    return None if disturbed else transport_s(trial)


def usual_transport_s(found_s: Sequence[float]) -> float:
    """Take the median of what was found at one stream, from 0 to TRANSPORT_S.

    A client that is always late is late at one stream, too.
    """
    return min(TRANSPORT_S, max(0.0, median(found_s)))


def _throttled(trial: Trial) -> Iterator[Caveat]:
    """Check that the GPU was not slowed by heat or power."""
    inside = telemetry.within(trial.telemetry, *trial.summary.window_s)
    causes = [c for c in SLOWDOWNS.values() if telemetry.throttled_share(inside, [c])]
    slowed = telemetry.throttled_share(inside, causes) or 0.0
    capped = telemetry.throttled_share(inside, [POWER_CAP]) or 0.0
    if slowed > MOST_SLOWED:
        yield _caveat(
            trial,
            "throttled",
            f"the GPU was slowed for {slowed:.0%} of the window ({', '.join(causes)}): cool it or"
            " improve its power supply, and measure again",
        )
    if capped > MOST_CAPPED:
        yield _caveat(
            trial,
            "at the power limit",
            f"the GPU ran at its power limit for {capped:.0%} of the window: absolute figures are"
            " those of this limit",
            blocks=False,
        )


def _trend(trial: Trial) -> Iterator[Caveat]:
    """Check that a step took as long at the end of the window as at its beginning.

    The load of a closed loop is the same all along, so a trend is the machine's or the engine's.
    In waves and in an open loop the requests in decode come and go, so that steps are compared with
    those of as many requests. That withholds no verdict: in a window of few waves, or soon after
    the start of an open loop, contexts grow along the window, and steps with them.
    """
    load = trial.point.load
    varying = load.open_loop or load.kind == "waves"
    change = _change_at_equal_load(trial) if varying else _change(trial)
    if load.kind in ("ramp", "day"):  # its own change takes work beside the steps, too
        change = None
    if change is None:
        yield _caveat(
            trial,
            "trend not checked",
            f"too few steps{' with as many requests in decode' * varying} lie along the window to"
            " tell whether the engine slowed in it",
            blocks=False,
        )
        return
    log_change, p_of = change
    test = "the jackknife's p" if varying else "Theil-Sen's slope; Kendall's p"
    if abs(log_change) > math.log1p(MOST_TREND) and p_of() < TREND_P:
        equal = " with as many requests in decode" * varying
        context = "; longer contexts along the window may be the reason too" * varying
        yield _caveat(
            trial,
            "trend in the window",
            f"a step{equal} took {math.exp(log_change):.2g} times as long at the end of the window"
            f" as at its beginning ({test} < {TREND_P}): warm the engine up for longer, or end what"
            f" else uses the machine{context}",
            blocks=not varying,
        )


def _change(trial: Trial) -> tuple[float, Callable[[], float]] | None:
    """Return by how much the logarithm of a step's length changed along the window.

    With it comes what computes its p, which only a large change needs. None where too little of the
    window has steps.
    """
    times, steps_s = step_times_s(trial)
    if len(times) < LEAST_SLICES:
        return None
    slope = float(scipy.stats.theilslopes(np.log(steps_s), times)[0])
    return (
        slope * trial.window_length_s,
        lambda: float(scipy.stats.kendalltau(times, steps_s).pvalue),
    )


def _change_at_equal_load(trial: Trial) -> tuple[float, Callable[[], float]] | None:
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


def _other_work(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that the machine worked for this trial alone; an endpoint's machine is not known."""
    other_work = trial.other_work
    if (other_work.steal_share or 0.0) > MOST_STEAL:
        text = (
            f"other guests of the host took {other_work.steal_share:.1%} of this trial's CPU time"
        )
        yield _caveat(trial, "load from others", text)
    if other_work.gpu_processes:
        text = (
            f"processes of others that used the GPU: {other_work.gpu_processes}; end them, or name"
            " another GPU in CUDA_VISIBLE_DEVICES, and measure again"
        )
        yield _caveat(trial, "GPU shared", text)
    if other_work.other_processes_share is None or expected.endpoint:
        return
    # an old trial did not record what the engine used: it was no more than others left
    engine_share = other_work.engine_share
    of = "the engine's CPU time" if engine_share is not None else "the CPU time that was left"
    if engine_share is None:
        engine_share = 1 - other_work.other_processes_share
    least = LEAST_OTHERS_CORES / other_work.cores if other_work.cores else LEAST_OTHERS
    if other_work.other_processes_share > max(least, MOST_OTHERS * engine_share):
        relative = other_work.other_processes_share / engine_share if engine_share else math.inf
        yield _caveat(
            trial,
            "other processes",
            f"other processes on this machine used {relative:.0%} of {of}: end them and measure"
            " again",
        )


def _unreadable(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that the engine's metrics could be read, those at least on which the checks rest."""
    known_metrics = ENGINES[trial.point.variant.engine].shown_metrics()
    if trial.engine is None:
        if not known_metrics and not expected.endpoint:
            text = "it has no page of metrics: what it did is proved from the client's side alone"
            yield _caveat(trial, "engine shows no metrics", text, blocks=False)
        elif expected.metrics_read:
            text = "its /metrics could not be read, so nothing proves what it did"
            yield _caveat(trial, "engine's metrics unreadable", text)
        else:
            text = "this endpoint shows no metrics: nothing is proved from the engine's side"
            yield _caveat(trial, "engine shows no metrics", text, blocks=False)
        return
    needed = [metrics.REQUESTS, metrics.PROMPT_TOKENS, metrics.GENERATION_TOKENS]
    needed += [metrics.PREFIX_HITS] if dose.caching(trial) and not expected.endpoint else []
    if not expected.endpoint:
        needed = [name for name in needed if name in known_metrics]
    missing = [name for name in needed if name not in trial.engine.values]
    if metrics.TTFT in known_metrics or expected.endpoint:
        missing += [metrics.TTFT] if metrics.TTFT not in trial.engine.histograms else []
    if missing:
        text = f"the engine shows no {', '.join(missing)}: was it renamed in this version?"
        yield _caveat(trial, "engine's metrics incomplete", text)


# ------------------------------------------------------------------------- faults of the set-up


def _exhausted(trial: Trial) -> Iterator[Caveat]:
    if ran_out(trial.point, trial.summary):
        workload = trial.point.workload
        bound = f" and `workloads.{workload.name}.most_requests`" * bool(workload.most_requests)
        text = f"the window was cut short: raise `requests`{bound}"
        yield _caveat(trial, "ran out of requests", text, blocks=False)


def _unseen_hardware(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Name the checks of a GPU that could not be made.

    A part of a GPU (MIG, vGPU) refuses them, whatever its user does; of any other they can be made.
    """
    inside = telemetry.within(trial.telemetry, *trial.summary.window_s)
    unread = [
        what
        for what, is_known in (
            ("whether other processes used it", trial.other_work.gpu_processes is not None),
            ("whether heat or power slowed it", telemetry.throttled_share(inside, []) is not None),
        )
        if not is_known
    ]
    if expected.on_gpus and unread:
        ruled_out = f"the GPU does not show {', nor '.join(unread)}: this is not ruled out"
        part = ", as a part of a GPU (MIG, vGPU) often does not"
        text = ruled_out.replace(":", f"{part}:") if expected.gpu_part else ruled_out
        yield _caveat(trial, "hardware could not be read", text, blocks=not expected.gpu_part)


def _server_busy(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that the API server, a process of Python that hardly uses more than a core, had time.

    It sends each token of every stream. Where it is always busy, chunks wait for it, users for
    their answers, and the engine for the users' next requests: the figures, throughput and
    latencies alike, are then the server's limit, and two variants look the same whatever the engine
    does. That is what this vLLM serves on this machine, so it withholds no verdict; on a GPU every
    answer of the run says it as well (telling.summary). Several servers, on cores that the
    engine leaves free, mend it there. They are no default: no lab has run with them on a GPU, where
    an engine that does not start would cost more than a verdict with a caveat. On a CPU what keeps
    the server busy may be the engine itself, by which the cores' caches, memory and clock are used,
    and more servers would take cores from it.

    Where there are several, it is about the busiest. Other threads of a server, which Python lets
    compute meanwhile, are in its CPU time, too, so that one near the limit may not be at it. One
    whose core others take is at its limit sooner; those are named by `_other_work`.
    """
    share = trial.other_work.server_core_share
    if share is None or share <= MOST_SERVER:
        return
    flags = trial.point.flags
    mend = "send less"
    if expected.on_gpus and not flags.get("enable-lora"):
        count = max(4, 2 * flags.api_server_count)
        several = f'`SET="flags.api-server-count={count}"`'
        mend += f", or have more of them with {several}, in a run that is marked ad hoc"
    yield _caveat(
        trial,
        SERVER_BUSY,
        f"vLLM's API server, which takes requests in and sends tokens out, used {share:.0%} of the"
        " one core that a process of Python can use, so these figures may be its limit and not the"
        f" engine's: {mend}",
        blocks=False,
    )


def _too_few(trial: Trial) -> Iterator[Caveat]:
    """Check that each metric is taken over five requests at least, or as many long prompts."""
    for what, count, hit in (
        ("request", len(trial.measured_requests), OVER_REQUESTS),
        ("long prompt", len(trial.intruders), OVER_LONG_PROMPTS),
    ):
        if count < LEAST_COUNTED and (what == "request" or trial.point.workload.intruder):
            yield _caveat(
                trial,
                f"too few {what}s",
                f"the window has {counted(count, what)}, and a figure needs {LEAST_COUNTED}: raise"
                " `window_s`",
                metrics=hit,
            )


OVER_LONG_PROMPTS = tuple(n for n, m in METRICS.items() if m.statistic.per == "long prompt")
OVER_REQUESTS = tuple(
    name
    for name, metric in METRICS.items()
    if not metric.by_engine and metric.statistic.per in ("request", "trial")
)


def _answered(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that prompts and answers have the lengths asked for, and come token by token."""
    completed = trial.answered
    if odd := sum(sum(r.chunks.tokens) != r.output_tokens for r in completed):
        yield _caveat(
            trial,
            "token counts differ",
            f"in {counted(odd, 'answer')} the tokens of the chunks do not add up to the reported"
            " usage: ITL and TPOT are estimates on this server",
        )
    later = [r.chunks.tokens[1:] for r in trial.measured_requests]
    several = sum(k > 1 for k in itertools.chain(*later)) / max(1, sum(map(len, later)))
    if several > MOST_SEVERAL and not trial.point.flags.speculative_config:
        mostly = several > MOSTLY_SEVERAL
        yield _caveat(
            trial,
            "several tokens a chunk",
            f"{several:.0%} of the chunks carry more than one token: the client or the server fell"
            " behind the engine, or collects tokens; ITL is spread evenly over a chunk's tokens",
            blocks=mostly,
            metrics=TOKEN_TIMES if mostly else (),
        )
    if different := [r for r in completed if r.output_tokens != r.asked_tokens]:
        first = different[0]
        text = (
            f"{counted(len(different), 'answer')} of another length than requested; the first has"
            f" {first.output_tokens} tokens instead of {first.asked_tokens}"
        )
        yield _caveat(trial, "lengths differ", text)
    yield from _prompts_differ(trial, completed, expected)


def _prompts_differ(
    trial: Trial, completed: Sequence[RequestRecord], expected: Expected
) -> Iterator[Caveat]:
    """Check the engine's count of prompt tokens; an endpoint may have a tokenizer of its own."""
    off = OTHER_TOKENIZER if expected.endpoint else 0.0
    different = [
        (r.prompt_tokens, asked)
        for r in completed
        if r.index < len(trial.asked)
        for asked in [trial.asked[r.index].prompt_tokens]
        if r.prompt_tokens is not None and abs(r.prompt_tokens - asked) > off * asked
    ]
    if different:
        by_engine, asked = different[0]
        text = (
            f"{counted(len(different), 'prompt')} of another length than planned; in the first the"
            f" engine counts {by_engine} tokens instead of {asked}"
        )
        yield _caveat(trial, "prompts differ", text)


def _treated(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that the engine shows what the point asks for, in the dose that was predicted."""
    yield from _answered_by(trial, expected)
    yield from _structured(trial)
    if trial.engine is None:
        return
    yield from _cached(trial, expected)
    if expected.endpoint:
        return  # its engine was not configured here: there is no treatment to prove
    faults = (_not_echoed, _not_given, _not_served, _not_guessed, _not_shown)
    for fault in itertools.chain.from_iterable(of(trial, expected) for of in faults):
        yield _caveat(trial, "treatment not applied", fault)


def _answered_by(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that every answer came from the adapter, or from the base model, that was asked for.

    A record before this was recorded has no name; a new one that lacks it proves nothing.
    """
    wrong = [
        (r.model, wanted)
        for r in trial.records
        if r.ok and r.index < len(trial.asked) and (r.model or expected.served)
        for wanted in [trial.asked[r.index].adapter or expected.model]
        if wanted and r.model != wanted
    ]
    if wrong:
        answered, wanted = wrong[0]
        text = (
            f"{counted(len(wrong), 'answer')} from another model than requested; the first came"
            f" from {literal(answered or 'one without a name')} instead of {literal(wanted)}"
        )
        yield _caveat(trial, "treatment not applied", text)


def _structured(trial: Trial) -> Iterator[Caveat]:
    """Check that every answer begins as the structure that was imposed on it demands."""
    if not trial.point.workload.structure or not trial.point.workload.structure.imposed:
        return
    answers = [
        (r.text, spec)
        for r in trial.records
        if r.ok and r.index < len(trial.asked) and (spec := trial.asked[r.index].structure)
    ]
    if odd := [text or "" for text, spec in answers if not begins_so(text or "", spec)]:
        text = (
            f"{len(odd)} of {len(answers)} answers do not begin as the imposed structure demands;"
            f" the first begins with: {literal(odd[0][:60])}"
        )
        yield _caveat(trial, "treatment not applied", text)


def _cached(trial: Trial, expected: Expected) -> Iterator[Caveat]:
    """Check that as much was found in the prefix cache as the requests share, and no more."""
    assert trial.engine
    hits = trial.engine.values.get(metrics.PREFIX_HITS)
    if hits is None:
        return  # named where the engine's metrics are checked
    bounds = dose.cached_tokens(trial, expected.template_tokens)
    if bounds is None:
        if not expected.endpoint:
            text = "the engine does not say how large a block of its prefix cache is"
            yield _caveat(trial, "engine's metrics incomplete", text)
        return
    if expected.endpoint:  # whether it caches at all was not set here
        bounds = dose.Bounds(0, bounds.high)
    if hits > bounds.high:
        yield _caveat(
            trial,
            "warm prefix cache",
            f"{hits:.0f} prompt tokens were found in the cache, but these prompts share {bounds}:"
            " was the cache not reset, or is another client using the engine?",
        )
    if hits < bounds.low:
        text = f"{hits:.0f} prompt tokens were found in the cache; expected were {bounds}"
        yield _caveat(trial, "treatment not applied", text)


ECHOED = {  # flag -> the info metric and the label under which the engine says it again
    "enable-prefix-caching": (metrics.CACHE_CONFIG, "enable_prefix_caching"),
    "block-size": (metrics.CACHE_CONFIG, "block_size"),
    "kv-cache-memory-bytes": (metrics.CACHE_CONFIG, "kv_cache_memory_bytes"),
    "kv-cache-dtype": (metrics.CACHE_CONFIG, "cache_dtype"),
    "enforce-eager": (metrics.ENGINE_CONFIG, "enforce_eager"),
}


ARGUMENTS = {  # flags that a server's log names, unless they have vLLM's default
    "async-scheduling": None,
    "attention-backend": None,
    "enable-chunked-prefill": None,
    "max-cpu-loras": None,
    "max-lora-rank": "16",
    "max-loras": "1",
    "max-model-len": None,
    "max-num-batched-tokens": None,
    "max-num-queued-reqs": None,
    "max-num-queued-tokens": None,
    "max-num-seqs": None,
    "num-gpu-blocks-override": None,
    "scheduling-policy": "fcfs",
}


def _not_given(trial: Trial, expected: Expected) -> Iterator[str]:
    """Name the flags that the server says it was given otherwise than set, or did not get.

    What it was given was not read from its log in old runs.
    """
    assert trial.engine
    given = trial.engine.info.get(metrics.ENGINE_ARGUMENTS)
    if given is None or not expected.served or trial.point.variant.engine != DEFAULT_ENGINE:
        return
    flags = trial.point.engine_flags
    for flag, default in ARGUMENTS.items():
        name = flag.replace("-", "_")
        if flag not in flags:
            if name in given:
                yield f"the server says that it was given {name}={given[name]}, which was not set"
            continue
        wanted = str(flags[flag])
        if (said := given.get(name, default)) != wanted:
            yield f"the server says that it was given {name}={said}, but {wanted} was set"


def _not_echoed(trial: Trial, expected: Expected) -> Iterator[str]:
    """Name the flags that the engine says it runs with in another way, or not at all.

    Its log was not read in old runs, and another engine says nothing of vLLM's flags.
    """
    assert trial.engine
    for flag, (metric, label) in ECHOED.items():
        if flag not in trial.point.flags or trial.point.variant.engine != DEFAULT_ENGINE:
            continue
        if metric not in trial.engine.info and not expected.served:
            continue
        wanted = str(trial.point.flags[flag])
        echoed = trial.engine.info.get(metric, {}).get(label)
        # `fp8` stands for a type of the engine's choice, which it names in full
        if echoed != wanted and not (wanted == "fp8" and str(echoed).startswith("fp8")):
            yield f"the engine reports {label}={echoed}, but {wanted} was set"


def _not_served(trial: Trial, expected: Expected) -> Iterator[str]:
    """Say in what the weights that the engine says it loaded are others than those of the run."""
    assert trial.engine
    wanted = expected.served.get(trial.point.variant.name)
    if wanted is None:
        return
    served = trial.engine.info.get(metrics.SERVED, {})
    if served.get("files_sha256") != wanted.files_sha256:
        yield (
            "the files of the model that the engine reports to serve"
            f" ({literal(served.get('folder', 'it names none'))}) are not those of the manifest"
        )
    method = trial.engine.info.get(metrics.ENGINE_CONFIG, {}).get("quantization")
    if method is None:
        yield "the engine does not report whether and how its weights are quantized"
    elif (method != "None") != wanted.quantized:
        what = "quantized weights" if wanted.quantized else "weights that are not quantized"
        yield f"the engine reports quantization={method} for {what}"
    if wanted.random and (fault := random_weights.fault(trial.engine.info.get(metrics.ZEROS, {}))):
        yield f"{fault}, and zeros are multiplied faster than other numbers"


def _not_guessed(trial: Trial, expected: Expected) -> Iterator[str]:
    """Say in what speculation was another than configured and predicted."""
    assert trial.engine
    if not trial.point.flags.speculative_config:
        return
    values = trial.engine.values
    drafts, drafted, accepted = (
        values.get(m) for m in (metrics.SPEC_DRAFTS, metrics.SPEC_DRAFTED, metrics.SPEC_ACCEPTED)
    )
    if drafts is None or drafted is None or accepted is None:
        yield "the engine does not count its drafts"
        return
    bounds = dose.drafted_tokens(trial)
    if bounds and not bounds.hold(drafted):
        yield f"the engine drafted {drafted:.0f} tokens; expected were {bounds}"
    bounds = dose.draft_yield(trial)
    if bounds and not bounds.hold(drafts + accepted):
        yield (
            f"{drafts:.0f} drafts with {accepted:.0f} accepted tokens do not add up to the tokens"
            f" that were sent ({bounds})"
        )
    predicted = expected.acceptance.get(trial.point.key)
    bounds = None if predicted is None else dose.accepted_share(trial, predicted)
    if (least := expected.least_copied.get(trial.point.key)) is not None:
        bounds = dose.copied_share(least)
    if bounds and drafted and not bounds.hold(accepted / drafted):
        yield (
            f"{accepted / drafted:.1%} of the drafted tokens were accepted; predicted were"
            f" {bounds.low:.1%} to {bounds.high:.1%}"
        )


def _not_shown(trial: Trial, expected: Expected) -> Iterator[str]:
    """Say what the engine shows where the lab's evidence asks for something else."""
    for item in expected.evidence:
        if item.arm.matches(trial.point):
            yield from _contradictions(item, trial)


def _contradictions(evidence: Evidence, trial: Trial) -> Iterator[str]:
    assert trial.engine
    name, values = evidence.metric, trial.engine.values
    if evidence.kind == "echoes":
        label, wanted = evidence.label, evidence.expected(trial.point)
        reported = trial.engine.info.get(name, {}).get(label)
        if reported != wanted:
            said = literal(str(reported))
            yield f"the engine reports {label}={said}, but {wanted or 'nothing'} was expected"
    elif evidence.kind == "pieces":
        yield from _other_pieces(METRICS[name].of(trial), trial)
    elif evidence.kind == "absent":
        if name in values:
            yield f"the engine has the metric {name}, which it should not have here"
    elif _is_of_client(evidence, trial):
        turned_away = sum(r.turned_away for r in trial.records)
        yield from _otherwise(evidence, "the client's count of requests turned away", turned_away)
    elif name not in values:
        yield f"the engine has no counter {name}, so that nothing is proved: was it renamed?"
    else:
        yield from _otherwise(evidence, f"the engine's {name}", values[name])


def _otherwise(evidence: Evidence, counter: str, increase: float) -> Iterator[str]:
    """Say how a counter has changed, if it rose and was to stay, or stayed and was to rise."""
    if evidence.kind == "rises" and increase <= 0:
        yield f"{counter} did not rise in the trial, but should have"
    if evidence.kind == "stays" and increase != 0:
        yield f"{counter} rose by {increase:,.0f} in the trial, but should not have risen"


def _other_pieces(pieces: float | None, trial: Trial) -> Iterator[str]:
    """Say in how many pieces a long prompt came, unless its budget makes about as many."""
    expected = expected_pieces(trial.point)
    if pieces is None:
        yield "no stream ran long enough beside a long prompt to count its pieces"
    elif not 0.7 * expected <= pieces <= 1.3 * expected + _steps_before(trial):
        yield (
            f"a stream received {number(pieces)} tokens on average while a long prompt was"
            " prefilled, one with each of its pieces, but its token budget makes"
            f" {counted(expected, 'piece')}"
        )


def _is_of_client(evidence: Evidence, trial: Trial) -> bool:
    """Tell whether the client's records have what was turned away: the engine has no limit.

    vLLM counts that since it has limits: before, a missing counter proves nothing, and the client
    sees what is refused.
    """
    assert trial.engine
    if evidence.metric != metrics.TURNED_AWAY:
        return False
    counts = evidence.metric in trial.engine.values
    return trial.point.admission_by_client or not (counts or trial.point.flags.turns_away)


def _steps_before(trial: Trial) -> float:
    """Estimate at most how many steps pass between a long prompt's send and its first piece.

    These are one or two where steps are long; a GPU takes several while the prompt is parsed and
    tokenized.
    """
    intruder, step_s = trial.point.workload.intruder, METRICS["itl_p50_s"].of(trial)
    if not intruder or not step_s:
        return 2.5
    delay_s = TRANSPORT_S + TOKENIZE_S * intruder.prompt_tokens
    return max(2.5, 1 + delay_s / step_s)


# ------------------------------------------------------------------------- of more than one trial


def confounded(claim: Claim, treatment: Point, baseline: Point) -> list[Caveat]:
    """Warn where more than one factor differs between the sides, so that the cause is unknown.

    It blocks the verdict unless the claim says why the factors are coupled.
    """
    differing = factors(treatment, baseline)
    if len(differing) < 2:
        return []
    return [
        Caveat(
            name=f"more than one factor: {', '.join(differing)}",
            text=claim.coupled or "change one alone, or both sides alike",
            blocks=not claim.coupled,
            point=treatment.key,
        )
    ]


def found_too_little(
    point: Point, repeats: Sequence[dose.CacheHits], expected: Expected, own_repeats: int
) -> list[Caveat]:
    """Check that a point's repeats found as much in the prefix cache as was forecast of their mean.

    `repeats` are those that were measured; the forecast is one of the lab's `own_repeats`. Where
    chance decides nothing, each was checked on its own.
    """
    if not any(repeat.by_chance for repeat in repeats):
        return []
    least_rate, least_found = (
        expected.least_hit_rate[point.key], expected.least_found.get(point.key, ()),
    )  # fmt: skip
    bounds = dose.hits_over_repeats(repeats, least_rate, least_found)
    hits = sum(r.hits for r in repeats)
    if len(repeats) < own_repeats:
        text = (
            f"{len(repeats)} of {own_repeats} repeats were measured, and how much is found in the"
            " prefix cache is forecast of their mean alone: resume the run"
        )
        return [Caveat(name="treatment not proved", text=text, blocks=True, point=point.key)]
    if hits < bounds.low:
        text = (
            f"{hits:.0f} prompt tokens were found in the cache over {len(repeats)} repeats;"
            f" expected were {bounds}"
        )
        return [Caveat(name="treatment not applied", text=text, blocks=True, point=point.key)]
    return []


def first_trial_slow(repeats: Repeats, point: str) -> list[Caveat]:
    """Warn where the first repeat's throughput is below that of all others by over a quarter."""
    rates = by_repeat(repeats, "output_tokens_per_s")
    if len(rates) < 3:
        return []
    first, *later = (rates[repeat] for repeat in sorted(rates))
    if first < 0.75 * min(later):
        text = f"the first repeat had {first / float(np.mean(later)):.0%} of the others' throughput"
        return [Caveat(name="slow first trial", text=text + ": warm up for longer", point=point)]
    return []


def speed_jumped_within(trial: TimedTrial) -> list[Caveat]:
    """Name a jump of the machine's speed from before a trial to after it, if it was large.

    The trial is then measured again, as what it measured lies between two machines.
    """
    if what := large_jump(trial):
        text = f"the reference step's {what}"
        return [Caveat(name=SPEED_JUMPED, text=text, point=trial.point)]
    return []


def speed_jumped(trials: Sequence[TimedTrial]) -> list[Caveat]:
    """Name the trials around which the machine's own speed jumped, by its reference steps.

    A caveat, and no ground to withhold a verdict: a reference step is a sample of 0.1 s beside a
    trial, not of what went on within it.
    """
    run = machine_speed(trials)
    rule = f"a jump is more than {MOST_CHANGED:.0%}"
    return [
        Caveat(
            name=SPEED_JUMPED,
            text=f"the reference step's {what} ({rule}): measure again on a quiet machine",
            point=trial.point,
        )
        for trial in trials
        if run and (what := jump(trial, run))
    ]
