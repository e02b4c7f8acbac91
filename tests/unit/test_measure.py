"""Trial-level metrics on a hand-made trial."""

import math
from dataclasses import replace

import pytest

from labs.harness.analysis.measure import (
    LEAST_SAMPLES,
    OtherWork,
    Trial,
    expected_pieces,
    grows,
    influences,
    output_tokens_per_s,
    percentile,
    percentiles,
    stalls_s,
)
from labs.harness.analysis.metrics import METRICS, measure, trial_metrics
from labs.harness.spec import theory
from loadtests.records import RequestRecord
from loadtests.workload import Intruder, Samples
from serving import metrics
from serving.hardware.telemetry import Sample
from serving.metrics import PREFIX_HITS, PREFIX_QUERIES, TTFT, Histogram, Snapshot
from tests.unit.builders import CEILINGS, SHAPE, make_point, make_record, make_trial

# 200 requests of the window 10 to 20 s, TTFT 100, 101 ... 299 ms, then two tokens in one chunk
STEADY = [
    make_record([(sent + 0.1 + 0.001 * i, 1), (sent + 0.3 + 0.001 * i, 2)], sent_s=sent)
    for i in range(200)
    for sent in [10 + 0.045 * i]
]
OPEN = make_point(load="poisson:20")  # closed loops are in test_throughput.py
WARM_UP = make_record([(9.5, 1), (10.5, 4)], sent_s=9.0, in_window=False)
FAILED = make_record([], end_s=10.1)
ENGINE = Snapshot(
    {
        PREFIX_QUERIES: 400.0,
        PREFIX_HITS: 100.0,
        metrics.SPEC_DRAFTS: 50.0,
        metrics.SPEC_DRAFTED: 150.0,
        metrics.SPEC_ACCEPTED: 60.0,
        metrics.PREEMPTIONS: 3.0,
    },
    {TTFT: Histogram((1.0, float("inf")), (200, 200), 38.0, 200)},
    {metrics.CACHE_CONFIG: {"num_gpu_blocks": "40", "block_size": "16"}},
)
AT_300_W = [Sample(time_s, "0", energy_j=300 * time_s) for time_s in (8.0, 15.0, 22.0)]

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
    "server_core_share": 0.25,
    "turned_away_rate": None,  # the engine has no limit on its queue: see below
    "batch": 4.05,  # 200 x 0.2 s in decode, and half a second of the warm-up's
    "mbu": (2000 + 4.05 * 8 * 32) / 0.1 / 1e6,  # bytes a step, TPOT, 1 MB/s
    # 200 prompts of 4 tokens, a quarter of them cached; 404 later tokens; in 10 s, at 10 MFLOP/s
    "mfu": (200 * theory.prefill_flops(SHAPE, 4, 1) + 404 * (2000 + 64 * 8)) / 10 / 1e7,
    "intensity": 4.05 * (2000 + 64 * 8) / (2000 + 4.05 * 8 * 32),
    "flops_per_s": 60.4 * (2000 + 64 * 8),
    "prefix_hit_rate": 100 / 400,
    "busiest_share": None,  # there are no replicas
    "acceptance_rate": 60 / 150,
    "acceptance_length": 1 + 60 / 50,  # and the target's own token
    "preemptions": 3,
    "kv_capacity_tokens": 640,
    "prefill_pieces": None,  # nobody intrudes here: see below
    "stall_mean_s": None,
    "intruder_ttft_mean_s": None,
    "usd_per_million_tokens": 3.6 / 3600 / 60.4 * 1e6,
    "joules_per_token": 300 / 60.4,
    "engine_ttft_mean_s": 38 / 200,
    "client_ttft_mean_s": (200 * 0.1995 + 0.5) / 201,  # the warm-up too, as the engine counts it
}


def test_every_metric_by_hand() -> None:
    trial = make_trial([WARM_UP, *STEADY, FAILED], engine=ENGINE, point=OPEN, telemetry=AT_300_W)
    work = OtherWork(server_core_share=0.25)
    values = measure(replace(trial, usd_per_hour=3.6, other_work=work))
    assert values == pytest.approx(EXPECTED)


def test_times_and_what_is_lost_or_paid_are_better_where_lower() -> None:
    times = {name for name in trial_metrics() if METRICS[name].unit == "s"}
    assert {name for name in trial_metrics() if METRICS[name].better == "lower"} == times | {
        "error_rate", "turned_away_rate", "usd_per_million_tokens", "preemptions",
        "prefill_pieces", "joules_per_token", "server_core_share", "busiest_share",
    }  # fmt: skip


def test_units_are_those_of_the_names() -> None:
    seconds = {name for name, metric in METRICS.items() if metric.unit == "s"}
    assert seconds == {name for name in METRICS if name.endswith("_s") and "_per_" not in name}


def test_an_open_loop_counts_what_arrives_in_the_window_whoever_sent_it() -> None:
    edges = [(9.999, 1), (10.0, 10), (19.999, 100), (20.0, 1000)]  # from 10, before 20
    broken = make_record([(15.0, 5)], error="reset", in_window=False)
    records = [make_record(edges, in_window=False), broken]
    assert output_tokens_per_s(make_trial(records, point=OPEN)) == 11.5


def test_request_metrics_count_requests_sent_in_the_window_that_succeeded() -> None:
    late = make_record([(10.9, 1), (11.9, 1)], in_window=False)
    broken = make_record([(10.9, 1), (11.9, 1)], error="reset")
    good = make_record([(10.1, 1), (10.2, 1)])
    values = measure(make_trial([late, broken, good, FAILED], point=OPEN))
    assert (values["ttft_mean_s"], values["tpot_mean_s"]) == pytest.approx((0.1, 0.1))
    assert (values["requests_per_s"], values["goodput_per_s"]) == (0.1, 0.1)
    assert values["error_rate"] == 0.5


def test_what_a_limit_turns_away_has_not_failed() -> None:
    """Unless the engine has no limit on its queue, and so no reason to refuse anything."""
    good, full = make_record([(10.1, 1), (10.2, 1)]), make_record([], error="HTTP 503: busy")
    records = [good, full, make_record([], error="HTTP 500: broken"), full]
    limited = make_point(load="poisson:1", flags={"max-num-queued-reqs": 4})
    values = measure(make_trial(records, point=limited))
    assert (values["error_rate"], values["turned_away_rate"]) == (1 / 4, 2 / 4)
    values = measure(make_trial(records, point=OPEN))
    assert (values["error_rate"], values["turned_away_rate"]) == (3 / 4, None)


def test_an_error_counts_whenever_it_was_sent_among_all_requests_of_the_trial() -> None:
    early = make_record([], error="reset", in_window=False)
    good = make_record([(10.1, 1), (10.2, 1)])
    late = make_record([(21.0, 1), (21.1, 1)], in_window=False)
    full = make_record([], error="HTTP 503: busy", in_window=False)
    limited = make_point(load="poisson:1", flags={"max-num-queued-reqs": 4})
    values = measure(make_trial([early, good, late, full], point=limited))
    assert (values["error_rate"], values["turned_away_rate"]) == (1 / 4, 0)


@pytest.mark.parametrize(("q", "least"), LEAST_SAMPLES.items())
def test_percentile_needs_samples_beyond_it(q: int, least: int) -> None:
    assert percentile([1.0] * (least - 1), q) is None
    assert percentile([1.0] * least, q) == 1


@pytest.mark.parametrize("n", [4, 5, 29, 30, 199, 200, 257])
def test_percentiles_are_computed_together_as_each_by_itself(n: int) -> None:
    samples = [math.sin(i) for i in range(n)]
    assert percentiles(samples) == {
        q: value for q in LEAST_SAMPLES if (value := percentile(samples, q)) is not None
    }


def test_p99_needs_two_hundred_samples() -> None:
    assert LEAST_SAMPLES == {50: 5, 90: 30, 99: 200}
    values = measure(make_trial(STEADY[:199]))
    assert (values["ttft_p99_s"], values["ttft_p90_s"]) == pytest.approx(
        (None, 0.1 + 0.001 * 178.2)
    )
    assert values["itl_p99_s"] == pytest.approx(0.1)  # 398 samples: two a request


@pytest.mark.parametrize(("served_of", "growing"), [(0.8, True), (0.96, False), (1, False)])
def test_ttft_grows_where_more_arrives_than_is_served(served_of: float, growing: bool) -> None:
    """Of ten requests a second so many are served, one after another."""
    sent_s = [0.1 * n for n in range(100)]
    found = [
        make_record([(0.5 + at_s / served_of, 1)], sent_s=at_s, scheduled_s=at_s) for at_s in sent_s
    ]
    assert grows(found) == growing
    assert not grows(found[:5])


def test_percentile_is_of_raw_samples_by_linear_interpolation() -> None:
    assert percentile([5.0, 1.0, 2.0, 3.0, 4.0, 10.0], 50) == 3.5


def test_goodput_needs_every_part_of_the_slo() -> None:
    good, slow_start = [(10.2, 1), (10.3, 1)], [(10.3, 1), (10.4, 1)]
    slow_tokens, single = [(10.1, 1), (10.3, 1)], [(10.1, 1)]
    records = [make_record(chunks) for chunks in (good, slow_start, slow_tokens, single)]
    trial = make_trial(records, point=OPEN)
    assert METRICS["goodput_per_s"].of(trial) == 2 / 10  # one token has no TPOT


def test_an_open_loops_batch_counts_decode_within_the_window_alone() -> None:
    spans = [(8.0, 12.0), (18.0, 30.0), (1.0, 9.0), (21.0, 22.0), (9.0, 21.0)]
    records = [make_record([(a, 1), (b, 1)]) for a, b in spans]
    assert METRICS["batch"].of(make_trial(records, point=OPEN)) == (2 + 2 + 0 + 0 + 10) / 10


def test_mfu_counts_the_part_of_a_prefill_that_lies_in_the_window() -> None:
    """Sent at 8 s, its first token at 12 s: half of the prefill is after the window's start."""
    straddling = make_record([(12.0, 1)], sent_s=8.0, prompt_tokens=64)
    expected = theory.prefill_flops(SHAPE, 64) / 2 / 10 / CEILINGS.bf16_flops_per_s
    assert METRICS["mfu"].of(make_trial([straddling], point=OPEN)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["mbu", "intensity"])
def test_a_step_that_may_give_several_tokens_has_no_bytes_a_token(metric: str) -> None:
    guessing = make_point(flags={"speculative-config": {"method": "ngram"}})
    assert METRICS[metric].of(make_trial(STEADY, point=make_point()))
    assert METRICS[metric].of(make_trial(STEADY, point=guessing)) is None


def test_mbu_counts_keys_and_values_as_they_are_cached() -> None:
    plain, quantized = (
        METRICS["mbu"].of(make_trial(STEADY, point=make_point(flags={"kv-cache-dtype": dtype})))
        for dtype in ("auto", "fp8_e4m3")
    )
    assert plain
    assert quantized
    size = METRICS["batch"].of(make_trial(STEADY))
    assert size
    assert (plain - quantized) * 1e6 * 0.1 == pytest.approx(size * 8 * 32 / 2)


def test_nothing_arrived_is_none_not_zero() -> None:
    values = measure(make_trial([FAILED]))
    there = {name: value for name, value in values.items() if value is not None}
    assert there == {"error_rate": 1, "requests_per_s": 0, "goodput_per_s": 0}


@pytest.mark.parametrize("window_s", [(10.0, 10.0), (12.0, 10.0)])
def test_empty_window_gives_no_rates(window_s: tuple[float, float]) -> None:
    values = measure(make_trial(STEADY, window_s=window_s))
    assert [values[n] for n in ("output_tokens_per_s", "requests_per_s", "goodput_per_s", "batch",
                               "mbu", "mfu")] == [None] * 6  # fmt: skip


def test_a_price_that_the_run_did_not_record_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reader has set since changes no figure on file."""
    monkeypatch.setenv("LABS_PRICE_PER_HOUR", "3.6")
    assert measure(make_trial(STEADY))["usd_per_million_tokens"] is None


def test_engine_without_metrics_has_no_engine_figures() -> None:
    for engine in (None, Snapshot()):
        values = measure(make_trial(STEADY, engine=engine))
        assert [values[n] for n in ("engine_ttft_mean_s", "prefix_hit_rate", "acceptance_rate",
                                   "acceptance_length", "preemptions", "kv_capacity_tokens")
                ] == [None] * 6  # fmt: skip


def test_an_engine_that_has_drafted_nothing_has_no_acceptance() -> None:
    nothing = dict.fromkeys(metrics.SPECULATION, 0.0)
    values = measure(make_trial(STEADY, engine=Snapshot(nothing)))
    assert (values["acceptance_rate"], values["acceptance_length"]) == (None, None)


@pytest.mark.parametrize("blocks", ["None", ""])
def test_a_cache_of_unknown_size_has_no_capacity(blocks: str) -> None:
    config = {metrics.CACHE_CONFIG: {"num_gpu_blocks": blocks, "block_size": "16"}}
    assert METRICS["kv_capacity_tokens"].of(make_trial([], engine=Snapshot(info=config))) is None


# ---------------------------------------------------------------------------- an intruder's visit

CONTENDED = make_point(
    load="contended:2/3",
    flags={"max-num-batched-tokens": 34},
    intruder=Intruder(prompt_tokens=96),
)
"""Three steps of 32 tokens of a long prompt, beside two streams."""


def stream(index: int, *times: float, **fields: float) -> RequestRecord:
    return make_record([(t, 1) for t in times], index=index, **fields)


# the long prompt is sent at 11.05 and has its token at 11.6, with the third step's others
VISIT = stream(3, 11.6, sent_s=11.05)
STREAM = stream(0, 10.9, 11.0, 11.2, 11.4, 11.6, 11.7)
BESIDE = stream(1, 10.95, 11.0, 11.1, 11.5, 11.602, 11.7)


def visited(*records: RequestRecord) -> Trial:
    return make_trial(list(records), point=CONTENDED)


def test_the_stall_is_the_longest_gap_that_touches_the_visit_whole() -> None:
    assert stalls_s(visited(STREAM, VISIT)) == pytest.approx([0.2])
    assert stalls_s(visited(STREAM, BESIDE, VISIT)) == pytest.approx([0.4])
    elsewhere = stream(1, 10.0, 11.04, 11.9)  # 1.04 s before it, 0.86 s across it
    assert stalls_s(visited(elsewhere, VISIT)) == pytest.approx([0.86])


def test_stalls_are_averaged_over_visits_and_one_beside_nobody_counts_not() -> None:
    second, alone = stream(7, 11.66, sent_s=11.62), stream(11, 13.5, sent_s=13.0)
    trial = visited(STREAM, VISIT, second, alone)
    assert stalls_s(trial) == pytest.approx([0.2, 0.1])
    assert METRICS["stall_mean_s"].of(trial) == pytest.approx(0.15)


def test_an_intruder_counts_neither_as_a_request_nor_against_itself() -> None:
    visits = (VISIT, stream(7, 11.3, 11.9, sent_s=11.2))
    trial = make_trial([STREAM, *visits], point=CONTENDED, answered_under_load=True)
    values = measure(trial)
    assert values["requests_per_s"] == pytest.approx(2 / 1.7)
    assert values["ttft_mean_s"] == pytest.approx(0.9)
    assert values["intruder_ttft_mean_s"] == pytest.approx((0.55 + 0.1) / 2)
    assert values["output_tokens_per_s"] == pytest.approx(2 * 6 / 1.7)
    assert values["stall_mean_s"] == pytest.approx(0.2)


def test_pieces_are_the_tokens_streams_got_meanwhile() -> None:
    """The last step's token arrives together with the intruder's own, or just after."""
    assert METRICS["prefill_pieces"].of(visited(STREAM, VISIT)) == 3
    assert METRICS["prefill_pieces"].of(visited(STREAM, BESIDE, VISIT)) == 3
    barely = stream(1, 11.5, 11.6, 11.7)
    assert METRICS["prefill_pieces"].of(visited(STREAM, barely, VISIT)) == 3
    assert METRICS["prefill_pieces"].of(visited(barely, VISIT)) is None


def test_a_stream_that_came_late_or_left_early_counts_at_its_own_pace() -> None:
    """Steps of 0.1 s from 11.05 to 12.05: ten, of which each stream saw seven or so."""
    visit = stream(3, 12.05, sent_s=11.05)
    came = stream(0, *(11.35 + 0.1 * i for i in range(12)))
    left = stream(1, *(10.85 + 0.1 * i for i in range(10)))
    assert METRICS["prefill_pieces"].of(visited(came, visit)) == pytest.approx(10)
    assert METRICS["prefill_pieces"].of(visited(left, visit)) == pytest.approx(10)


@pytest.mark.parametrize(("budget", "pieces"), [(34, 3), (33, 4), (98, 1), (1024, 1), (10, 12)])
def test_as_many_pieces_as_the_budget_leaves_beside_the_streams(budget: int, pieces: int) -> None:
    point = make_point(
        load="contended:2/3",
        flags={"max-num-batched-tokens": budget},
        intruder=Intruder(prompt_tokens=96),
    )
    assert expected_pieces(point) == pieces


def in_turn() -> Trial:
    """Three requests of one user, 10 s apart, of 2 to 4 tokens, beside those of another engine."""
    found = [
        make_record(
            [(10 * i + 0.2 + 0.1 * i, 1), (10 * i + 1.0 + 0.1 * i, 1 + i)],
            sent_s=10 * i, index=i, end_s=10 * i + 1.0 + 0.1 * i,
        )
        for i in range(3)
    ]  # fmt: skip
    trial = make_trial(found, window_s=(0, 30), answered_under_load=True)
    return replace(trial, beside=("on/short/concurrent-1",))


def test_what_a_request_moves_a_figure_by() -> None:
    """Less each request in turn, a figure changes by that, in the first order."""
    trial = in_turn()
    found = influences(trial)
    ttfts_s = [0.2, 0.3, 0.4]
    assert found["ttft_mean_s"] == {i: round(s / 0.3 - 1, 6) for i, s in enumerate(ttfts_s)}
    tokens, cycles_s = [2, 3, 4], [1.0, 1.1, 1.2]
    assert found["output_tokens_per_s"] == pytest.approx(
        {i: k / 3 - s / 1.1 for i, (k, s) in enumerate(zip(tokens, cycles_s, strict=True))},
        abs=2e-6,
    )
    assert set(found) == {"ttft_mean_s", "tpot_mean_s", "output_tokens_per_s"}
    assert all(sum(of.values()) == pytest.approx(0, abs=1e-5) for of in found.values())


def test_it_is_told_only_where_requests_took_turns() -> None:
    assert influences(replace(in_turn(), beside=())) == {}
    several = make_point(samples=Samples(count=2, together=True, temperature=0.8))
    assert influences(replace(in_turn(), point=several)) == {}


def test_a_figure_that_a_request_lacks_is_moved_by_none() -> None:
    """As TPOT, of a completion of one token."""
    one = make_record([(25.0, 1)], sent_s=24.0, index=3)
    trial = in_turn()
    found = influences(replace(trial, records=[*trial.records, one]))
    assert set(found) == {"ttft_mean_s", "output_tokens_per_s"}


def test_rates_leave_out_the_pauses_in_which_others_are_served() -> None:
    """Nine tokens in cycles of 3.3 s, not in a window of 30."""
    assert measure(in_turn())["output_tokens_per_s"] == pytest.approx(9 / 3.3, rel=0.02)


def test_energy_is_not_told_apart_where_requests_took_turns() -> None:
    """The run keeps no samples then: what the processors used, they used for all engines."""
    assert measure(in_turn())["joules_per_token"] is None
