"""Exports the client's metrics to Prometheus, for the dashboards that show a lab while it runs.

The labels are only `lab`, `variant` and `run_id`. Which workload and load are being sent is in one
info-like gauge, `lab_load_point`, which is 1 meanwhile. Long prompts that are sent beside streams
count as requests, but their latencies are left out, as in the report. Buckets grow by less than a
fifth, so that a quantile read from them is within 20%; exact figures come from the records, never
from here. The histograms are those of `loadtests/latencies.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

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


class Exporter:
    """Owns the registry of metrics, which follow the trials one after another."""

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
        self._is_intruder: Callable[[int], bool] = lambda index: False
        self._turns_away = False
        self._now: tuple[str, ...] = ()
        self._point: tuple[str, ...] = ()
        self._last_progress = Progress()

    def _counter(self, name: str, text: str, labels: Sequence[str] = LABELS) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = LABELS) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def serve(self, port: int) -> None:
        """Serve the metrics over HTTP on loopback."""
        prometheus_client.start_http_server(port, "127.0.0.1", self.registry)

    def begin(self, plan: TrialPlan) -> None:
        """Follow a new trial, and create every series of its labels at zero."""
        self._now = (plan.lab, plan.variant, plan.run_id)
        for histogram in self._histograms.values():
            histogram.observe(self._now, [])
        # looked up once, since a look-up by labels costs as much as ten tokens' samples
        self._ok_now, self._failed_now, self._turned_away_now = (
            self._requests.labels(*self._now, outcome) for outcome in ("ok", "error", "turned away")
        )
        self._output_now, self._prompt_now = (
            c.labels(*self._now) for c in (self._output, self._prompt)
        )
        for metric in (self._sent, self._in_flight):
            metric.labels(*self._now)
        if plan.arrival.open_loop:
            self._scheduled.labels(*self._now)
        for name, seconds in plan.slo_s.items():
            self._slo.labels(plan.lab, plan.run_id, name).set(seconds)
        self._last_progress = Progress()
        self._point = (*self._now, plan.workload, plan.arrival.name)
        self._load_point.labels(*self._point).set(1)
        self._warm_up.labels(*self._now).set(1)
        self._is_intruder = plan.is_intruder
        self._turns_away = plan.turns_away

    def end(self) -> None:
        """End the trial: its gauges fall to zero, or disappear where nothing is measured now.

        Nothing happens where none was begun.
        """
        if not self._point:
            return
        self._load_point.labels(*self._point).set(0)
        self._warm_up.labels(*self._now).set(0)
        self._in_flight.labels(*self._now).set(0)
        for gauge in (self._overdue, self._loop_lag, self._adapters):
            gauge.remove(*self._now)
        self._point = ()

    def progress(self, now: Progress) -> None:
        """Update the metrics of the load; counters grow by the difference to the last call."""
        self._sent.labels(*self._now).inc(now.sent - self._last_progress.sent)
        if now.due is not None:
            self._scheduled.labels(*self._now).inc(now.due - (self._last_progress.due or 0))
            self._overdue.labels(*self._now).set(max(0, now.due - now.sent))
        self._in_flight.labels(*self._now).set(now.in_flight)
        self._warm_up.labels(*self._now).set(not now.warm)
        if now.adapters is not None:
            self._adapters.labels(*self._now).set(len(now.adapters))
        if now.loop_lag_s is not None:
            self._loop_lag.labels(*self._now).set(now.loop_lag_s)
        self._last_progress = now

    def observe(self, record: RequestRecord) -> None:
        """Count a request that ended; one that failed has no latencies, as in the report.

        As there, a refusal has not failed where the engine's queue has a limit.
        """
        refused = self._turns_away and record.turned_away
        ended = self._turned_away_now if refused else self._failed_now
        (self._ok_now if record.ok else ended).inc()
        if record.send_lag_s is not None:
            self._histograms[SEND_LAG.histogram].observe(self._now, [record.send_lag_s])
        if not record.ok:
            return
        self._output_now.inc(record.output_tokens or 0)
        self._prompt_now.inc(record.prompt_tokens or 0)
        if self._is_intruder(record.index):
            return
        for latency in (TTFT, TPOT, E2E):
            if samples_s := latency.samples_s(record):
                self._histograms[latency.histogram].observe(self._now, samples_s)
        itl_s = record.itl_s
        counts, total = bucket_counts(itl_s), sum(itl_s)
        self._histograms[ITL.histogram].add(self._now, counts, total)
        if len(itl_s) == len(record.chunks) - 1:  # one token per chunk: chunk gaps are the ITL
            self._histograms[CHUNK_GAP.histogram].add(self._now, counts, total)
        else:
            self._histograms[CHUNK_GAP.histogram].observe(self._now, record.chunk_gaps_s)
