"""Trial-level metrics on a hand-made trial."""

import pytest

from labs.measure import LEAST_SAMPLES, METRICS, measure, output_tokens_per_s, percentile
from serving.metrics import PREFIX_HITS, PREFIX_QUERIES, TTFT, Histogram, Snapshot
from tests.unit.builders import make_record, make_trial

# 200 requests of the window 10 to 20 s, TTFT 100, 101 ... 299 ms, then two tokens in one chunk
STEADY = [
    make_record([(sent + 0.1 + 0.001 * i, 1), (sent + 0.3 + 0.001 * i, 2)], sent_s=sent)
    for i in range(200)
    for sent in [10 + 0.045 * i]
]
WARM_UP = make_record([(9.5, 1), (10.5, 4)], sent_s=9.0, in_window=False)
FAILED = make_record([])
ENGINE = Snapshot(
    {PREFIX_QUERIES: 400.0, PREFIX_HITS: 100.0},
    {TTFT: Histogram((1.0, float("inf")), (200, 200), 38.0, 200)},
)

EXPECTED = {
    "output_tokens_per_s": (200 * 3 + 4) / 10,  # the warm-up's second chunk came in the window
    "requests_per_s": 200 / 10,
    "goodput_per_s": 101 / 10,  # TTFT of at most 200.5 ms: the first 101
    "ttft_mean_s": 0.1995,
    "ttft_p50_s": 0.1 + 0.001 * 99.5,
    "ttft_p90_s": 0.1 + 0.001 * 179.1,
    "ttft_p99_s": 0.1 + 0.001 * 197.01,
    "tpot_mean_s": 0.1,
    "tpot_p50_s": 0.1,
    "tpot_p99_s": 0.1,
    "itl_p50_s": 0.1,
    "itl_p99_s": 0.1,
    "chunk_gap_p99_s": 0.2,
    "e2e_p50_s": 0.3 + 0.001 * 99.5,
    "e2e_p99_s": 0.3 + 0.001 * 197.01,
    "error_rate": 1 / 202,
    "batch": 4.05,  # 200 x 0.2 s in decode, and half a second of the warm-up's
    "mbu": (2000 + 4.05 * 8 * 32) / 0.1 / 1e6,  # bytes a step, TPOT, 1 MB/s
    "mfu": 60.4 * (2000 + 64 * 8) / 1e7,
    "intensity": 4.05 * (2000 + 64 * 8) / (2000 + 4.05 * 8 * 32),
    "flops_per_s": 60.4 * (2000 + 64 * 8),
    "prefix_hit_rate": 100 / 400,
    "usd_per_million_tokens": 3.6 / 3600 / 60.4 * 1e6,
    "engine_ttft_mean_s": 38 / 200,
    "client_ttft_mean_s": (200 * 0.1995 + 0.5) / 201,  # the warm-up too, as the engine counts it
}
LOWER_IS_BETTER = {
    "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "tpot_p50_s",
    "tpot_p99_s", "itl_p50_s", "itl_p99_s", "chunk_gap_p99_s", "e2e_p50_s", "e2e_p99_s",
    "error_rate", "usd_per_million_tokens", "engine_ttft_mean_s", "client_ttft_mean_s",
}  # fmt: skip


def test_every_metric_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRICE_PER_HOUR", "3.6")
    found = measure(make_trial([WARM_UP, *STEADY, FAILED], engine=ENGINE))
    assert found == pytest.approx(EXPECTED)


def test_direction_of_every_metric() -> None:
    assert {n for n, m in METRICS.items() if m.better == "lower"} == LOWER_IS_BETTER


def test_units_are_those_of_the_names() -> None:
    seconds = {name for name, metric in METRICS.items() if metric.unit == "s"}
    assert seconds == {name for name in METRICS if name.endswith("_s") and "_per_" not in name}


def test_throughput_counts_what_arrives_in_the_window_whoever_sent_it() -> None:
    edges = [(9.999, 1), (10.0, 10), (19.999, 100), (20.0, 1000)]  # from 10, before 20
    broken = make_record([(15.0, 5)], error="reset", in_window=False)
    assert output_tokens_per_s(make_trial([make_record(edges, in_window=False), broken])) == 11.5


def test_request_metrics_count_requests_sent_in_the_window_that_succeeded() -> None:
    late = make_record([(10.9, 1), (11.9, 1)], in_window=False)
    broken = make_record([(10.9, 1), (11.9, 1)], error="reset")
    good = make_record([(10.1, 1), (10.2, 1)])
    found = measure(make_trial([late, broken, good, FAILED]))
    assert (found["ttft_mean_s"], found["tpot_mean_s"]) == pytest.approx((0.1, 0.1))
    assert (found["requests_per_s"], found["goodput_per_s"]) == (0.1, 0.1)
    assert found["error_rate"] == 0.5


@pytest.mark.parametrize(("q", "least"), LEAST_SAMPLES.items())
def test_percentile_needs_samples_beyond_it(q: int, least: int) -> None:
    assert percentile([1.0] * (least - 1), q) is None
    assert percentile([1.0] * least, q) == 1


def test_p99_needs_two_hundred_samples() -> None:
    assert LEAST_SAMPLES == {50: 5, 90: 30, 99: 200}
    found = measure(make_trial(STEADY[:199]))
    assert (found["ttft_p99_s"], found["ttft_p90_s"]) == pytest.approx((None, 0.1 + 0.001 * 178.2))
    assert found["itl_p99_s"] == pytest.approx(0.1)  # 398 samples: two a request


def test_percentile_is_of_raw_samples_by_linear_interpolation() -> None:
    assert percentile([5.0, 1.0, 2.0, 3.0, 4.0, 10.0], 50) == 3.5


def test_goodput_needs_every_part_of_the_slo() -> None:
    good, slow_start = [(10.2, 1), (10.3, 1)], [(10.3, 1), (10.4, 1)]
    slow_tokens, single = [(10.1, 1), (10.3, 1)], [(10.1, 1)]
    found = [make_record(chunks) for chunks in (good, slow_start, slow_tokens, single)]
    assert METRICS["goodput_per_s"].of(make_trial(found)) == 2 / 10  # one token has no TPOT


def test_batch_counts_decode_within_the_window_alone() -> None:
    spans = [(8.0, 12.0), (18.0, 30.0), (1.0, 9.0), (21.0, 22.0), (9.0, 21.0)]
    found = [make_record([(a, 1), (b, 1)]) for a, b in spans]
    assert METRICS["batch"].of(make_trial(found)) == (2 + 2 + 0 + 0 + 10) / 10


def test_nothing_arrived_is_none_not_zero() -> None:
    found = measure(make_trial([FAILED]))
    there = {name: value for name, value in found.items() if value is not None}
    assert there == {"error_rate": 1, "requests_per_s": 0, "goodput_per_s": 0}


@pytest.mark.parametrize("window_s", [(10.0, 10.0), (12.0, 10.0)])
def test_empty_window_gives_no_rates(window_s: tuple[float, float]) -> None:
    found = measure(make_trial(STEADY, window_s=window_s))
    assert [found[n] for n in ("output_tokens_per_s", "requests_per_s", "goodput_per_s", "batch",
                               "mbu", "mfu")] == [None] * 6  # fmt: skip


def test_no_price_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRICE_PER_HOUR", raising=False)
    assert measure(make_trial(STEADY))["usd_per_million_tokens"] is None


def test_engine_without_metrics_has_no_engine_figures() -> None:
    for engine in (None, Snapshot()):
        found = measure(make_trial(STEADY, engine=engine))
        assert (found["engine_ttft_mean_s"], found["prefix_hit_rate"]) == (None, None)
