"""Exports the client's metrics to Prometheus, for the dashboards that show a lab while it runs.

The labels are only `lab`, `variant` and `run_id`. Which workload and load are being sent is in one
info-like gauge, `lab_load_point`, which is 1 meanwhile. Long prompts that are sent beside streams
count as requests, but their latencies are left out, as in the report. Buckets grow by less than a
fifth, so that a quantile read from them is within 20%; exact figures come from the records, never
from here. The histograms are those of `loadtests/latencies.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily

from loadtests.latencies import CHUNK_GAP, E2E, ITL, LATENCIES, SEND_LAG, TPOT, TTFT
from loadtests.plan import Progress, TrialPlan
from loadtests.records import RequestRecord

LABELS = ("lab", "variant", "run_id")
REQUESTS, OUTPUT_TOKENS, PROMPT_TOKENS = (
    "lab_requests", "lab_output_tokens", "lab_prompt_tokens",
)  # fmt: skip
SCHEDULED, SENT = "lab_requests_scheduled", "lab_requests_sent"
OVERDUE, IN_FLIGHT, ADAPTERS = (
    "lab_requests_overdue", "lab_requests_in_flight", "lab_adapters_in_flight",
)  # fmt: skip
LOOP_LAG, SLO = "lab_loop_lag_seconds", "lab_slo_seconds"
LOAD_POINT, WARM_UP = "lab_load_point", "lab_warm_up"


def _buckets(low: float, high: float, growth: float = 1.19) -> list[float]:
    bounds = [low]
    while bounds[-1] < high:
        bounds.append(float(f"{bounds[-1] * growth:.4g}"))
    return bounds


BUCKET_BOUNDS_S = np.array(_buckets(0.0005, 120))
_BOUNDS = BUCKET_BOUNDS_S.tolist()
_LE = [*map(str, _BOUNDS), "+Inf"]


Counts = np.ndarray[tuple[int], np.dtype[np.int64]]  # the number of samples in each bucket


def bucket_counts(values: Sequence[float]) -> Counts:
    """Count the values, in seconds, in the bucket of the first bound that is not below each."""
    return np.bincount(np.searchsorted(BUCKET_BOUNDS_S, values), minlength=len(_LE))


class SecondsHistogram:
    """A histogram of seconds that takes all samples of a request at once.

    The library's own takes them one by one, which costs a sixth of the time of reading the stream.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts: dict[tuple[str, ...], Counts] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, labels: tuple[str, ...], values: Sequence[float]) -> None:
        """Add samples in seconds; without any, the series is only created."""
        if labels not in self._counts:
            self._counts[labels] = np.zeros(len(_LE), np.int64)
            self._sums[labels] = 0.0
        if len(values) == 1:
            self._counts[labels][bisect_left(_BOUNDS, values[0])] += 1
            self._sums[labels] += values[0]
        else:
            self.add(labels, bucket_counts(values), sum(values))

    def add(self, labels: tuple[str, ...], counts: Counts, total: float) -> None:
        """Add samples that were already counted by bucket, with their sum in seconds."""
        self._counts[labels] += counts
        self._sums[labels] += total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram as the Prometheus library wants it."""
        family = HistogramMetricFamily(self._name, self._text, labels=LABELS)
        for labels, counts in self._counts.items():
            buckets = list(zip(_LE, np.cumsum(counts).tolist(), strict=True))
            family.add_metric(labels, buckets, self._sums[labels])
        yield family


@dataclass
class _Followed:
    """A trial that metrics follow, with its counters.

    They are looked up once, since a look-up by labels costs as much as ten tokens' samples.
    """

    plan: TrialPlan
    labels: tuple[str, ...]
    point: tuple[str, ...]
    ok: Counter
    failed: Counter
    turned_away: Counter
    output: Counter
    prompt: Counter
    last_progress: Progress = field(default_factory=Progress)


class Exporter:
    """Owns the registry of metrics, which follow the trials one after another.

    Of trials that are played together each has a number, in the order in which they were begun.
    """

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._histograms = {
            latency.histogram: SecondsHistogram(latency.histogram, latency.description)
            for latency in LATENCIES
        }
        for histogram in self._histograms.values():
            self.registry.register(histogram)
        self._requests = self._counter(REQUESTS, "Requests ended", (*LABELS, "outcome"))
        self._output = self._counter(OUTPUT_TOKENS, "Output tokens of requests that ended well")
        self._prompt = self._counter(PROMPT_TOKENS, "Prompt tokens of requests that ended well")
        self._scheduled = self._counter(SCHEDULED, "Requests due by now, under open loop")
        self._sent = self._counter(SENT, "Requests sent")
        self._overdue = self._gauge(OVERDUE, "Requests due and not sent, under open loop")
        self._in_flight = self._gauge(IN_FLIGHT, "Requests sent and not ended")
        self._adapters = self._gauge(ADAPTERS, "Different adapters of the requests in flight")
        self._loop_lag = self._gauge(
            LOOP_LAG, "How late the load's event loop ran, the worst since the last report"
        )
        self._slo = self._gauge(
            SLO, "The longest time that a user should wait", ("lab", "run_id", "slo")
        )
        self._load_point = self._gauge(
            LOAD_POINT, "1 while this load is being sent", (*LABELS, "workload", "load")
        )
        self._warm_up = self._gauge(WARM_UP, "1 during the warm-up, which is not measured")
        self._followed: list[_Followed] = []

    def _counter(self, name: str, text: str, labels: Sequence[str] = LABELS) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = LABELS) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def serve(self, port: int) -> None:
        """Serve the metrics over HTTP on loopback."""
        prometheus_client.start_http_server(port, "127.0.0.1", self.registry)

    def begin(self, *plans: TrialPlan) -> None:
        """Follow a new trial, or several, and create every series of their labels at zero."""
        self._followed = [self._begun(plan) for plan in plans]

    def _begun(self, plan: TrialPlan) -> _Followed:
        labels = (plan.lab, plan.variant, plan.run_id)
        for histogram in self._histograms.values():
            histogram.observe(labels, [])
        for metric in (self._sent, self._in_flight):
            metric.labels(*labels)
        if plan.arrival.open_loop:
            self._scheduled.labels(*labels)
        for name, seconds in plan.slo_s.items():
            self._slo.labels(plan.lab, plan.run_id, name).set(seconds)
        point = (*labels, plan.workload, "" if plan.unnamed else plan.arrival.name)
        self._load_point.labels(*point).set(1)
        self._warm_up.labels(*labels).set(1)
        ok, failed, turned_away = (
            self._requests.labels(*labels, outcome) for outcome in ("ok", "error", "turned away")
        )
        output, prompt = (counter.labels(*labels) for counter in (self._output, self._prompt))
        return _Followed(plan, labels, point, ok, failed, turned_away, output, prompt)

    def end(self) -> None:
        """End the trials: their gauges fall to zero, or disappear where nothing is measured now.

        Nothing happens where none was begun.
        """
        for trial in self._followed:
            self._load_point.labels(*trial.point).set(0)
            self._warm_up.labels(*trial.labels).set(0)
            self._in_flight.labels(*trial.labels).set(0)
            for gauge in (self._overdue, self._loop_lag, self._adapters):
                gauge.remove(*trial.labels)
        self._followed = []

    def progress(self, now: Progress, number: int = 0) -> None:
        """Update the metrics of the load; counters grow by the difference to the last call."""
        trial = self._followed[number]
        labels, last = trial.labels, trial.last_progress
        self._sent.labels(*labels).inc(now.sent - last.sent)
        if now.due is not None:
            self._scheduled.labels(*labels).inc(now.due - (last.due or 0))
            self._overdue.labels(*labels).set(max(0, now.due - now.sent))
        self._in_flight.labels(*labels).set(now.in_flight)
        self._warm_up.labels(*labels).set(not now.warm)
        if now.adapters is not None:
            self._adapters.labels(*labels).set(len(now.adapters))
        if now.loop_lag_s is not None:
            self._loop_lag.labels(*labels).set(now.loop_lag_s)
        trial.last_progress = now

    def observe(self, record: RequestRecord, number: int = 0) -> None:
        """Count a request that ended; one that failed has no latencies, as in the report.

        As there, a refusal has not failed where the engine's queue has a limit.
        """
        trial = self._followed[number]
        labels = trial.labels
        refused = trial.plan.turns_away and record.turned_away
        ended = trial.turned_away if refused else trial.failed
        (trial.ok if record.ok else ended).inc()
        if record.send_lag_s is not None:
            self._histograms[SEND_LAG.histogram].observe(labels, [record.send_lag_s])
        if not record.ok:
            return
        trial.output.inc(record.output_tokens or 0)
        trial.prompt.inc(record.prompt_tokens or 0)
        if trial.plan.is_intruder(record.index):
            return
        for latency in (TTFT, TPOT, E2E):
            if samples_s := latency.samples_s(record):
                self._histograms[latency.histogram].observe(labels, samples_s)
        itl_s = record.itl_s
        counts, total = bucket_counts(itl_s), sum(itl_s)
        self._histograms[ITL.histogram].add(labels, counts, total)
        if len(itl_s) == len(record.chunks) - 1:  # one token per chunk: chunk gaps are the ITL
            self._histograms[CHUNK_GAP.histogram].add(labels, counts, total)
        else:
            self._histograms[CHUNK_GAP.histogram].observe(labels, record.chunk_gaps_s)
