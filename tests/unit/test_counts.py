"""The counts of a run: what the records, Prometheus and the engines say of the same requests."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from labs.harness.forecast.request_counts import Counts, counted_since
from loadtests.records import Chunks, RequestRecord
from serving import metrics
from serving.metrics import Histogram, Snapshot


def record(output_tokens: int | None) -> RequestRecord:
    return RequestRecord(0, 2, None, 1.0, Chunks([(1.5, 1)]), 2.0, 5, output_tokens, True)


def snapshot(requests: float | None, tokens: float) -> Snapshot:
    values = {metrics.GENERATION_TOKENS: tokens}
    return Snapshot({**values, **({} if requests is None else {metrics.REQUESTS: requests})})


class Prometheus:
    """Answers each query with the next of these values; keeps what was asked."""

    def __init__(self, *values: float | None) -> None:
        self.values, self.asked = list(values), list[tuple[str, float]]()

    def settle(self, expression: str, expected: float) -> float | None:
        self.asked.append((expression, expected))
        return self.values.pop(0)


def agreement(counts: Counts, *values: float | None) -> list[tuple[int, int | None, int | None]]:
    prometheus: Any = Prometheus(*values)
    rows = counts.agreement(prometheus)
    assert [row.what for row in rows] == ["requests", "output tokens"]
    for expression, _ in prometheus.asked:
        assert 'run_id="r"' in expression
        assert 'instance="127.0.0.1:9"' in expression
    return [(row.records, row.prometheus, row.engine) for row in rows]


def test_three_counts_of_the_same_requests() -> None:
    counts = Counts("r", exporter_port=9)
    counts.add([record(3), record(4)], snapshot(2, 7))
    counts.add([record(None)], snapshot(1, 0))
    assert agreement(counts, 3.0, 7.0) == [(3, 3, 3), (7, 7, 7)]


def test_a_trial_that_failed_is_in_prometheus_alone() -> None:
    counts = Counts("r", exporter_port=9)
    counts.add([record(3)], snapshot(1, 3))
    counts.discard([record(5), record(5)])
    assert agreement(counts, 3.0, 13.0) == [(1, 1, 1), (3, 3, 3)]


def test_what_an_engine_does_not_tell_once_is_unknown_for_good() -> None:
    counts = Counts("r", exporter_port=9)
    counts.add([record(3)], snapshot(None, 3))
    counts.add([record(3)], snapshot(1, 3))
    assert agreement(counts, 2.0, None) == [(2, 2, None), (6, None, 6)]
    counts.add([record(3)], None)
    assert agreement(counts, 3.0, 9.0) == [(3, 3, None), (9, 9, None)]


def test_the_engine_is_read_once_it_has_counted_the_last_request() -> None:
    later = [snapshot(11, 100), snapshot(12, 105), snapshot(12, 105)]
    engine: Any = type("", (), {"snapshot": lambda _: later.pop(0)})()
    risen = counted_since(engine, snapshot(10, 95), requests_done=2)
    assert risen
    assert risen.values[metrics.REQUESTS] == pytest.approx(2)
    assert risen.values[metrics.GENERATION_TOKENS] == pytest.approx(10)
    assert len(later) == 1
    assert counted_since(engine, None, requests_done=2) is None


def test_an_engine_with_other_buckets_than_before_tells_nothing() -> None:
    before, after = (
        replace(snapshot(2, 9), histograms={metrics.TTFT: Histogram(le, counts, 1.0, 2)})
        for le, counts in (((0.1, 1.0, math.inf), (1, 1, 2)), ((1.0, math.inf), (1, 2)))
    )
    engine: Any = type("", (), {"snapshot": lambda _: after})()
    assert counted_since(engine, before, requests_done=1) is None


def test_what_a_dead_load_generator_had_counted_is_unknown() -> None:
    """Its counters began anew with the next one, and what it sent last is on no record."""
    counts = Counts("r", exporter_port=9)
    counts.add([record(3)], snapshot(1, 3))
    counts.lose_prometheus()
    counts.add([record(4)], snapshot(1, 4))
    assert agreement(counts) == [(2, None, 2), (7, None, 7)]


def test_a_sitting_without_a_trial_to_play_waits_for_no_series() -> None:
    for done, ends in (([], True), ([record(3)], False)):
        counts, prometheus = Counts("r", exporter_port=9), Prometheus(0.0, 0.0)
        counts.add(done, snapshot(len(done), 3 * len(done)))
        asked: Any = prometheus
        counts.agreement(asked)
        assert [query.endswith(" or vector(0)") for query, _ in prometheus.asked] == [ends] * 2
