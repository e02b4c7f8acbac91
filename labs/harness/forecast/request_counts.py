"""Count requests and output tokens in three ways.

The records, Prometheus and the engines count the same things apart from one another; where they
disagree, one of them is wrong, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from dashboards.prometheus import Prometheus
from labs.harness.storage.recorded import Agreement
from loadtests.records import RequestRecord
from serving import metrics
from serving.engines.base import Server
from serving.metrics import Snapshot
from serving.processes.ports import LOOPBACK

REQUESTS, OUTPUT_TOKENS = "requests", "output tokens"
ENGINE_METRICS = {REQUESTS: metrics.REQUESTS, OUTPUT_TOKENS: metrics.GENERATION_TOKENS}


class Counts:
    """Adds up the counts of one sitting at a run, over all its trials."""

    def __init__(self, run_id: str, exporter_port: int) -> None:
        self._client = f'run_id="{run_id}",instance="{LOOPBACK}:{exporter_port}"'
        self._records = dict.fromkeys(ENGINE_METRICS, 0)
        self._discarded = dict.fromkeys(ENGINE_METRICS, 0)  # in trials that failed
        self._engines: dict[str, int | None] = dict.fromkeys(ENGINE_METRICS, 0)
        self._prometheus_is_whole = True

    def add(self, done: Sequence[RequestRecord], engine: Snapshot | None) -> None:
        """Count a trial's requests that succeeded, and by how much its engine's counters rose.

        Where an engine does not report a count, the engines' sum of it is unknown from then on.
        """
        _add(self._records, done)
        for name, metric in ENGINE_METRICS.items():
            total, increase = self._engines[name], engine.values.get(metric) if engine else None
            self._engines[name] = (
                None if total is None or increase is None else total + int(increase)
            )

    def discard(self, done: Sequence[RequestRecord]) -> None:
        """Subtract a trial that failed: Prometheus has its requests, its records are not used."""
        _add(self._discarded, done)

    def lose_prometheus(self) -> None:
        """Note that the load generator failed: what it had counted by then is not known."""
        self._prometheus_is_whole = False

    def agreement(self, prometheus: Prometheus) -> list[Agreement]:
        """Ask Prometheus for the same counts, and put all three side by side.

        The query names this sitting's exporter; a run that was resumed had another one before.
        """
        series = {
            REQUESTS: f'lab_requests_total{{outcome="ok",{self._client}}}',
            OUTPUT_TOKENS: f"lab_output_tokens_total{{{self._client}}}",
        }
        rows = []
        for name, selected in series.items():
            expected = self._records[name] + self._discarded[name]
            # the newest sample of an hour: a scrape that fails on a busy machine ends a series
            query = f"sum(last_over_time({selected}[1h]))"
            if not expected:  # a sitting without a trial to play has no series
                query += " or vector(0)"
            value = prometheus.settle(query, expected) if self._prometheus_is_whole else None
            rows.append(
                Agreement(
                    what=name,
                    records=self._records[name],
                    prometheus=None if value is None else int(value) - self._discarded[name],
                    engine=self._engines[name],
                )
            )
        return rows


def _add(counts: dict[str, int], done: Sequence[RequestRecord]) -> None:
    counts[REQUESTS] += len(done)
    counts[OUTPUT_TOKENS] += sum(record.output_tokens or 0 for record in done)


def counted_since(engine: Server, before: Snapshot | None, requests_done: int) -> Snapshot | None:
    """Return by how much the engine's counters rose, once it has counted the last request.

    It waits 2 s at most for that. None where the engine shows no metrics, or other buckets than
    before.
    """
    if before is None:
        return None
    deadline = time.monotonic() + 2
    while (after := engine.snapshot()) is not None:
        try:
            delta = after.since(before)
        except ValueError:
            return None
        counted = delta.values.get(metrics.REQUESTS)
        if counted is None or counted >= requests_done or time.monotonic() > deadline:
            return delta
        time.sleep(0.05)
    return None
