"""The bench's statistics, on hand-made records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from labs.judging.judge import Effect, Interval, Judgement, Outcome
from labs.telling import instruments
from loadtests import generator
from loadtests.records import RequestRecord
from tests import bench
from tests.unit.builders import PREDICTION


def client(index: int, *chunks: tuple[float, int], in_window: bool = True) -> RequestRecord:
    return RequestRecord(index, 2, None, 1.0, list(chunks), 9.0, 5, 2, in_window)


def server(*chunks: tuple[float, int]) -> dict[str, Any]:
    due = [at - 0.001 for at, _ in chunks]
    return {"received": 101.1, "chunks": [list(c) for c in chunks], "due": due}


def test_what_the_client_adds_is_the_difference_of_durations() -> None:
    truth = {7: server((101.6, 1), (101.7, 1))}
    found = bench.compare([client(7, (1.75, 1), (1.8, 1))], truth, t0=100.0)
    assert found.ttft_s == pytest.approx([0.75 - 0.5])  # 0.1 on the way there, 0.15 until read
    assert found.read_s == pytest.approx([0.15, 0.1])
    assert found.gap_s == pytest.approx([0.05])
    assert found.server_late_s == pytest.approx([0.001, 0.001])
    assert found.lost == 0


def test_warm_up_is_not_timed_but_its_losses_count() -> None:
    truth = {1: server((101.6, 1), (101.7, 1)), 2: server((101.6, 1), (101.7, 1))}
    sent = [
        client(1, (1.7, 1), (1.8, 1), in_window=False),
        client(2, (1.7, 1), in_window=False),  # one chunk short
        client(3),  # the server never saw it
    ]
    found = bench.compare(sent, truth, t0=100.0)
    assert found.lost == 2
    assert not found.ttft_s


def test_merged_chunks_count_as_lost() -> None:
    found = bench.compare([client(1, (1.7, 2))], {1: server((101.6, 1), (101.7, 1))}, t0=100.0)
    assert found.lost == 1


def test_delivered_share_looks_at_the_window_only() -> None:
    sent = [client(1, (0.5, 1), (1.0, 1), (1.5, 1), (3.0, 1))]
    assert bench.delivered(sent, (1.0, 3.0), ideal_chunks_per_s=2.0) == pytest.approx(0.5)


def test_rate_spans_first_send_to_last_token() -> None:
    answers = [bench.Answered(10, 11, 14, 4), bench.Answered(12, 14, 20, 4)]
    assert bench.rate(answers) == pytest.approx(0.8)
    assert bench.ttft_ms(answers) == pytest.approx(1500)
    assert bench.tpot_ms(answers) == pytest.approx(1500)


def test_overhead_is_what_neither_starts_nor_loads() -> None:
    assert bench.overhead_share(100, 30, 65) == pytest.approx(0.05)


def test_the_servers_record_tells_which_request_it_was(tmp_path: Any) -> None:
    asked = bench.TTFT_S + 1234 * bench.MARK_S
    log = tmp_path / "truth.jsonl"
    log.write_text(f'{{"received": 86400.25, "due": [{86400.25 + asked!r}]}}\n{{"due": []}}\n')
    assert list(bench.read_truth(log)) == [1234]


@pytest.mark.parametrize("row", bench.ROWS, ids=lambda row: row.title)
def test_enough_requests_are_written_for_the_fastest_client(row: bench.Row, tmp_path: Any) -> None:
    bench.write_programmed(tmp_path / "requests.jsonl", row)
    lines = len((tmp_path / "requests.jsonl").read_text().splitlines())
    longest_s = bench.WARMUP_S + bench.WINDOW_S + row.request_s
    assert lines >= row.streams * longest_s / row.request_s


def test_a_stall_is_in_what_an_instant_client_would_get() -> None:
    assert bench.Row(10).ideal_chunks_per_s == pytest.approx(10 * 50 / 0.54)
    assert bench.Row(10, stall_s=0.46).ideal_chunks_per_s == pytest.approx(10 * 50 / 1.0)


def test_several_processes_send_the_plain_streams_and_one_all_of_them() -> None:
    one, two = ((generator.LOCUSTFILE, n) for n in (1, 2))
    cases = bench.cases_of(bench.ROWS, [one, two])
    assert [row for row, sender in cases if sender == one] == list(bench.ROWS)
    assert [row.streams for row, sender in cases if sender == two] == [16, 64, 256]


def test_what_recording_costs_is_what_the_master_spends_more() -> None:
    recorded = bench.Cost(tokens=1000, master_cpu_s=0.003, all_cpu_s=0.010)
    bare = bench.Cost(tokens=2000, master_cpu_s=0.004, all_cpu_s=0.018)
    assert bench.recording_share(recorded, bare) == pytest.approx(0.1)


def judged(outcome: Outcome, spread: float | None = 0.02) -> Judgement:
    ratio = Interval(value=1.0, low=0.9, high=1.1, n=3)
    return Judgement(
        claim="aa", title="", metric="ttft_p50_s", treatment="t", baseline="b", outcome=outcome,
        expected=None, effect=Effect(ratio=ratio, floor=None, spread=spread),
        prediction=PREDICTION, prediction_held=None, why="",
    )  # fmt: skip


def test_false_alarms_are_claims_with_a_direction_of_those_that_were_judged() -> None:
    runs = [
        [judged("helps", 0.01), judged("no effect")],
        [judged("inconclusive"), judged("hurts", 0.03), judged("not valid", 9.0)],
    ]
    found = bench.alarms_of(runs, "tiny")
    assert (found.runs, found.alarms, found.judged, found.not_judged) == (2, 2, 4, 1)
    # Clopper and Pearson, 2 of 4
    assert (found.low, found.high) == pytest.approx((0.0676, 0.9324), abs=1e-4)
    assert found.spread == pytest.approx(0.02)


def test_none_in_eighty_still_leaves_room() -> None:
    found = bench.alarms_of([[judged("inconclusive")] * 4] * 20, "tiny")
    assert (found.alarms, found.judged, found.low) == (0, 80, 0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 80))


def test_time_to_come_is_as_expected_and_then_as_measured() -> None:
    clock = bench.Clock({"streams": 100.0, "engine": 60.0})
    with clock.during("streams"):
        assert clock.left_s(done=0.1, spent_s=30) == 70 + 60
        assert clock.left_s(done=0.5, spent_s=80) == 80 + 60
        assert clock.left_s(done=0.0, spent_s=500) == 60
    with clock.during("engine"):
        assert clock.left_s(done=0.0, spent_s=0) == 60


def answers(pace_s: float) -> list[bench.Answered]:
    """Two requests of eleven tokens, one every `pace_s`."""
    return [bench.Answered(at, at + 0.1, at + 0.1 + 10 * pace_s, 11) for at in (0.0, 1.0)]


def test_two_tools_are_compared_pair_by_pair(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        bench.OURS: [answers(0.010), answers(0.020)],
        bench.THEIRS: [answers(0.010), answers(0.020)],
    }
    for of in (bench.rate, bench.ttft_ms, bench.tpot_ms):
        same = bench.ratio_of(found, bench.OURS, of).ratio
        assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    bench.show_engine(found, {name: {(96.0, 22.0)} for name in found})
    said = capsys.readouterr().out
    assert "Mean TPOT, our Locust / vllm bench serve: 1.000" in said
    assert said.count("they agree") == 2
    assert "did not send the same work" not in said


def test_streams_are_shown_with_a_dash_for_what_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost = bench.Cost(delivered=[0.5], chunks=1000, worker_cpu_s=0.02, all_cpu_s=0.03)
    cost.errors.ttft_s = [0.002] * 10
    cost.errors.server_late_s = [0.001] * 10
    sent = cost.sent(bench.Row(16), processes=2)
    assert (sent.chunks_per_s, sent.delivered) == pytest.approx((8 * 50 / 0.54, 0.5))
    assert sent.ttft_added_p99_s == pytest.approx(0.002)
    assert sent.gap_error_p99_s is None
    bench.show_streams([sent])
    said = capsys.readouterr().out
    assert "20.0" in said
    assert "–" in said
    assert "TTFT added at 16 streams, 2 load processes, p99 at most 1 ms; it is 2 ms: not" in said


def test_what_is_read_from_a_file_was_disturbed_by_nobody() -> None:
    busy: Any = SimpleNamespace(shares=lambda: (0.1, 0.3))
    share = instruments.Overhead(lab="tiny", share=0.05)
    assert bench.dated(share, busy).cpu_others == 0
    recording = instruments.Recording(
        tokens_per_s=9000, share=Interval(value=0.02, low=None, high=None, n=1)
    )
    assert bench.dated(recording, busy).cpu_others == pytest.approx(0.4)
