"""What the load generator tells Prometheus, sample by sample."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram

from labs.harness.analysis.metrics import measure
from loadtests import exporter
from loadtests.exporter import Exporter
from loadtests.latencies import CHUNK_GAP, E2E, ITL, SEND_LAG, TPOT, TTFT
from loadtests.plan import Progress, TrialPlan, total_progress
from tests.unit.builders import make_point, make_record, make_trial, parse

STREAMS = (TTFT, ITL, TPOT, E2E, CHUNK_GAP)
MINE = {"lab": "l", "variant": "v", "run_id": "r"}


def plan_of(arrival: str, turns_away: bool = False, variant: str = "v") -> TrialPlan:
    return TrialPlan(
        url="", arrival=parse(arrival), requests=Path(), records=Path(), warmup_s=1,
        window_s=2, timeout_s=3, seed=0, lab="l", variant=variant, run_id="r", workload="w",
        slo_s={"ttft": 0.5}, turns_away=turns_away,
    )  # fmt: skip


def begun(arrival: str, turns_away: bool = False) -> Exporter:
    exported = Exporter()
    exported.begin(plan_of(arrival, turns_away))
    return exported


def value(of: Exporter, name: str, **labels: str) -> float | None:
    return of.registry.get_sample_value(name, labels or MINE)


def test_counters_grow_by_what_is_new_and_start_again_with_a_trial() -> None:
    exported = begun("poisson:2")
    assert value(exported, f"{exporter.SCHEDULED}_total") == 0
    for due, sent in ((4, 3), (9, 8)):
        exported.progress(Progress(sent=sent, due=due, in_flight=2))
    assert value(exported, f"{exporter.SCHEDULED}_total") == 9
    assert value(exported, f"{exporter.SENT}_total") == 8
    assert value(exported, exporter.IN_FLIGHT) == 2
    assert value(exported, exporter.OVERDUE) == 1


def test_where_no_trial_was_begun_none_ends() -> None:
    Exporter().end()
    ended = begun("poisson:2")
    for _ in range(2):
        ended.end()
    assert value(ended, exporter.IN_FLIGHT) == 0


def test_a_closed_loop_has_no_schedule() -> None:
    exported = begun("concurrent:2")
    exported.progress(Progress(sent=3))
    assert value(exported, f"{exporter.SCHEDULED}_total") is None
    assert value(exported, exporter.OVERDUE) is None
    assert value(exported, f"{exporter.SENT}_total") == 3


def test_trials_that_are_played_together_are_followed_apart() -> None:
    exported, (one, other) = Exporter(), (plan_of("concurrent:1", variant=v) for v in "vw")
    exported.begin(one, other)
    exported.progress(Progress(sent=2))
    exported.progress(Progress(sent=5), 1)
    exported.progress(Progress(sent=3))
    exported.observe(make_record([(10.1, 1), (10.2, 1)]), 1)
    theirs = {**MINE, "variant": "w"}
    assert [value(exported, f"{exporter.SENT}_total", **of) for of in (MINE, theirs)] == [3, 5]
    ended = [
        value(exported, f"{exporter.REQUESTS}_total", **of, outcome="ok") for of in (MINE, theirs)
    ]
    assert ended == [0, 1]
    point = {"workload": "w", "load": "concurrent-1"}
    sending = [value(exported, exporter.LOAD_POINT, **of, **point) for of in (MINE, theirs)]
    exported.end()
    over = [value(exported, exporter.LOAD_POINT, **of, **point) for of in (MINE, theirs)]
    assert (sending, over) == ([1, 1], [0, 0])


def test_what_is_not_watched_is_not_there_and_ends_with_the_trial() -> None:
    exported = begun("concurrent:2")
    exported.progress(Progress())
    assert value(exported, exporter.LOOP_LAG) is None
    assert value(exported, exporter.ADAPTERS) is None
    exported.progress(Progress(loop_lag_s=0.03, adapters=frozenset("ab")))
    assert value(exported, exporter.LOOP_LAG) == 0.03
    assert value(exported, exporter.ADAPTERS) == 2
    exported.end()
    assert value(exported, exporter.LOOP_LAG) is None
    assert value(exported, exporter.ADAPTERS) is None
    begun("concurrent:2").end()  # a trial that told nothing ends too


def test_the_slo_is_there_while_the_lab_runs() -> None:
    exported = begun("concurrent:2")
    assert value(exported, exporter.SLO, lab="l", run_id="r", slo="ttft") == 0.5


def test_a_request_that_failed_half_way_is_an_error_without_latencies() -> None:
    exported = begun("poisson:2")
    half = [(1.0, 1), (1.5, 1)]
    exported.observe(make_record(half, scheduled_s=0.2))
    exported.observe(make_record(half, scheduled_s=0.2, error="cut off"))
    assert value(exported, f"{exporter.REQUESTS}_total", **MINE, outcome="ok") == 1
    assert value(exported, f"{exporter.REQUESTS}_total", **MINE, outcome="error") == 1
    for latency in STREAMS:
        assert value(exported, f"{latency.histogram}_count") == 1, latency.title
    assert value(exported, f"{SEND_LAG.histogram}_count") == 2


@pytest.mark.parametrize("limited", [True, False])
def test_a_refusal_has_failed_unless_the_engine_limits_its_queue(limited: bool) -> None:
    """The shares are those of the report, by the metrics' own functions."""
    exported = begun("poisson:1", turns_away=limited)
    good, full = make_record([(10.1, 1), (10.2, 1)]), make_record([], error="HTTP 429: busy")
    found = [good, full, make_record([], error="HTTP 500: broken"), full]
    for record in found:
        exported.observe(record)
    ended = {
        outcome: value(exported, f"{exporter.REQUESTS}_total", **MINE, outcome=outcome) or 0
        for outcome in ("ok", "error", "turned away")
    }
    flags = {"max-num-queued-reqs": 4} if limited else {}
    values = measure(make_trial(found, point=make_point(load="poisson:1", flags=flags)))
    assert ended["error"] / sum(ended.values()) == values["error_rate"]
    assert ended["turned away"] / sum(ended.values()) == (values["turned_away_rate"] or 0)


def test_warm_up_lasts_until_what_is_sent_counts() -> None:
    exported = begun("waves:2")
    assert value(exported, exporter.WARM_UP) == 1
    for warm in (False, True):
        exported.progress(Progress(warm=warm))
        assert value(exported, exporter.WARM_UP) == (not warm)
    cut = begun("waves:2")
    cut.end()  # before a wave counted
    assert value(cut, exporter.WARM_UP) == 0


@pytest.mark.parametrize(("arrival", "streams"), [("contended:2/1", 3), ("concurrent:2", 4)])
def test_a_long_prompt_counts_but_its_latencies_are_not_the_streams(
    arrival: str, streams: int
) -> None:
    exported = begun(arrival)
    for index in range(4):
        exported.observe(make_record([(10.5, 1), (10.6, 2)], index=index))
    assert value(exported, f"{exporter.REQUESTS}_total", **MINE, outcome="ok") == 4
    assert value(exported, f"{exporter.OUTPUT_TOKENS}_total") == 12
    for latency in STREAMS:
        per_request = {ITL: 2}.get(latency, 1)
        samples = value(exported, f"{latency.histogram}_count")
        assert samples == streams * per_request, latency.title


def test_a_chunk_of_several_tokens_is_one_gap_and_several_intervals() -> None:
    exported = begun("concurrent:2")
    exported.observe(make_record([(1.0, 1), (1.5, 2), (2.5, 1)]))
    assert (value(exported, f"{ITL.histogram}_count"), value(exported, f"{ITL.histogram}_sum")) == (
        3,
        1.5,
    )
    assert value(exported, f"{CHUNK_GAP.histogram}_count") == 2
    exported.observe(make_record([(1.0, 1), (1.5, 1)]))
    assert value(exported, f"{ITL.histogram}_count") == 4
    assert value(exported, f"{CHUNK_GAP.histogram}_count") == 3


@pytest.mark.parametrize(
    ("shares", "whole"),
    [
        ([Progress(warm=True), Progress(warm=False)], Progress(warm=False)),
        ([Progress(warm=True), Progress(warm=True)], Progress(warm=True)),
        ([Progress(sent=1, in_flight=1), Progress(sent=2)], Progress(sent=3, in_flight=1)),
        ([Progress(due=2), Progress(due=3)], Progress(due=5)),
        ([Progress(loop_lag_s=0.1), Progress(loop_lag_s=0.2)], Progress(loop_lag_s=0.2)),
        (
            [Progress(adapters=frozenset("ab")), Progress(adapters=frozenset("bc"))],
            Progress(adapters=frozenset("abc")),
        ),
    ],
)
def test_load_processes_are_taken_together(shares: list[Progress], whole: Progress) -> None:
    assert total_progress(shares) == whole


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_a_histogram_of_many_samples_is_the_librarys_of_each(at_once: int) -> None:
    bounds = exporter.BUCKET_BOUNDS_S.tolist()
    samples = [bounds[3], bounds[3] + 1e-9, 0.0, 0.02, 0.02, 1000.0]  # a bound, and beyond the last
    mine, registry = CollectorRegistry(), CollectorRegistry()
    library = Histogram("lab_x_seconds", "x", exporter.LABELS, registry=registry, buckets=bounds)
    histogram = exporter.SecondsHistogram("lab_x_seconds", "x")
    mine.register(histogram)
    histogram.observe(("l", "v", "r"), [])
    for i in range(0, len(samples), at_once):
        histogram.observe(("l", "v", "r"), samples[i : i + at_once])
    for sample in samples:
        library.labels("l", "v", "r").observe(sample)

    def rows(of: CollectorRegistry) -> dict[tuple[str, str], float]:
        samples_out = [s for family in of.collect() for s in family.samples]
        return {
            (s.name, str(float(s.labels.get("le", "nan")))): s.value
            for s in samples_out
            if not s.name.endswith("_created")
        }

    assert rows(mine) == pytest.approx(rows(registry))
