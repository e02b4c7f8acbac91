"""The bench's statistics, on hand-made records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import (
    BenchError,
    aa,
    clients,
    engine,
    fleet,
    overhead,
    recording,
    soak,
    streams,
    trials,
    truth,
)
from bench import server as api_server
from bench.__main__ import MINUTES, PAIRS, PROCESSES, REPEATS, RUNS, Plan, dated
from bench.clock import Clock
from labs.harness.judging.judge import Effect, Interval, Judgement, VerdictKind
from labs.harness.telling import instruments
from loadtests import generator, records
from loadtests.plan import TrialPlan, TrialSummary
from loadtests.records import Chunks, RequestRecord
from serving.forecasting.plan import ForecastPlay
from serving.forecasting.traffic import Play, VirtualAnswer
from tests.unit.builders import PREDICTION, make_record, make_summary, write_run


def client(index: int, *chunks: tuple[float, int], in_window: bool = True) -> RequestRecord:
    return RequestRecord(index, 2, None, 1.0, Chunks(chunks), 9.0, 5, 2, in_window)


def server(*chunks: tuple[float, int]) -> dict[str, Any]:
    due = [at - 0.001 for at, _ in chunks]
    return {"received": 101.1, "chunks": [list(c) for c in chunks], "due": due}


def test_what_the_client_adds_is_the_difference_of_durations() -> None:
    log = {7: server((101.6, 1), (101.7, 1))}
    found = trials.compare([client(7, (1.75, 1), (1.8, 1))], log, t0=100.0, streams=4)
    assert found.ttft_s == pytest.approx([0.75 - 0.5])  # 0.1 on the way there, 0.15 until read
    assert not found.start_ttft_s
    assert found.read_s == pytest.approx([0.15, 0.1])
    assert found.gap_s == pytest.approx([0.05])
    assert found.server_late_s == pytest.approx([0.001, 0.001])
    assert found.lost == 0


def test_warm_up_is_not_timed_but_its_losses_count() -> None:
    log = {1: server((101.6, 1), (101.7, 1)), 2: server((101.6, 1), (101.7, 1))}
    sent = [
        client(1, (1.7, 1), (1.8, 1), in_window=False),
        client(2, (1.7, 1), in_window=False),  # one chunk short
        client(3),  # the server never saw it
    ]
    found = trials.compare(sent, log, t0=100.0, streams=1)
    assert found.lost == 2
    assert not found.ttft_s
    assert not found.start_ttft_s


def test_the_first_request_of_each_stream_is_timed_by_itself() -> None:
    """All streams send it at once, within the warm-up unless it lasts longer."""
    log = {n: server((101.6, 1), (101.7, 1)) for n in range(4)}
    sent = [
        client(0, (1.7, 1), (1.8, 1), in_window=False),
        client(1, (1.9, 1), (2.0, 1), in_window=False),
        client(2, (1.7, 1), (1.8, 1), in_window=False),  # a stream's second
        client(3, (1.75, 1), (1.8, 1)),
    ]
    found = trials.Errors()
    found += trials.compare(sent, log, t0=100.0, streams=2)
    assert found.start_ttft_s == pytest.approx([0.2, 0.4])
    assert found.ttft_s == pytest.approx([0.25])


def test_merged_chunks_count_as_lost() -> None:
    log = {1: server((101.6, 1), (101.7, 1))}
    assert trials.compare([client(1, (1.7, 2))], log, t0=100.0, streams=4).lost == 1


def test_delivered_share_looks_at_the_window_only() -> None:
    sent = [client(1, (0.5, 1), (1.0, 1), (1.5, 1), (3.0, 1))]
    assert trials.delivered(sent, (1.0, 3.0), ideal_chunks_per_s=2.0) == pytest.approx(0.5)


def test_rate_spans_first_send_to_last_token() -> None:
    answers = [clients.AnswerTimes(10, 11, 14, 4), clients.AnswerTimes(12, 14, 20, 4)]
    assert clients.rate(answers) == pytest.approx(0.8)
    assert clients.ttft_ms(answers) == pytest.approx(1500)
    assert clients.tpot_ms(answers) == pytest.approx(1500)


def test_overhead_is_what_neither_starts_nor_loads() -> None:
    assert overhead.overhead_share(100, 30, 65) == pytest.approx(0.05)


def test_the_servers_record_tells_which_request_it_was(tmp_path: Any) -> None:
    asked = truth.TTFT_S + 1234 * truth.MARK_S
    log = tmp_path / "truth.jsonl"
    log.write_text(f'{{"received": 86400.25, "due": [{86400.25 + asked!r}]}}\n{{"due": []}}\n')
    assert list(truth.read(log)) == [1234]


@pytest.mark.parametrize("program", truth.PROGRAMS, ids=lambda program: program.title)
def test_enough_requests_are_written_for_the_fastest_client(
    program: truth.Program, tmp_path: Any
) -> None:
    truth.write_requests(tmp_path / "requests.jsonl", program)
    lines = len((tmp_path / "requests.jsonl").read_text().splitlines())
    longest_s = truth.WARMUP_S + truth.WINDOW_S + program.request_s
    assert lines >= program.streams * longest_s / program.request_s


def test_a_stall_is_in_what_an_instant_client_would_get() -> None:
    assert truth.Program(10).ideal_chunks_per_s == pytest.approx(10 * 50 / 0.54)
    assert truth.Program(10, stall_s=0.46).ideal_chunks_per_s == pytest.approx(10 * 50 / 1.0)


def test_several_processes_send_the_plain_streams_and_one_all_of_them() -> None:
    one, two = ((generator.LOCUSTFILE, n) for n in (1, 2))
    cases = streams.cases_of(truth.PROGRAMS, [one, two])
    assert [program for program, sender in cases if sender == one] == list(truth.PROGRAMS)
    assert [program.streams for program, sender in cases if sender == two] == [16, 64, 256]


def test_what_recording_costs_is_what_the_master_spends_more() -> None:
    recorded = trials.Totals(tokens=1000, master_cpu_s=0.003, all_cpu_s=0.010)
    bare = trials.Totals(tokens=2000, master_cpu_s=0.004, all_cpu_s=0.018)
    assert recording.recording_share(recorded, bare) == pytest.approx(0.1)


def judged(outcome: VerdictKind, spread: float | None = 0.02) -> Judgement:
    ratio = Interval(value=1.0, low=0.9, high=1.1, n=3)
    return Judgement(
        claim="aa", title="", metric="ttft_p50_s", treatment="t", baseline="b", outcome=outcome,
        expected=None, effect=Effect(ratio=ratio, spread=spread),
        prediction=PREDICTION, prediction_outcome="open", margin=0.05, why="",
    )  # fmt: skip


def test_false_alarms_are_claims_with_a_direction_of_those_that_were_judged() -> None:
    runs = [
        [judged("helps", 0.01), judged("no effect")],
        [judged("inconclusive"), judged("hurts", 0.03), judged("not valid", 9.0)],
    ]
    found = aa.alarms_of(runs, "tiny")
    assert (found.runs, found.alarms, found.judged, found.not_judged) == (2, 2, 4, 1)
    # Clopper and Pearson, 2 of 4
    assert (found.low, found.high) == pytest.approx((0.0676, 0.9324), abs=1e-4)
    assert found.spread == pytest.approx(0.02)


def test_none_in_eighty_still_leaves_room() -> None:
    found = aa.alarms_of([[judged("inconclusive")] * 4] * 20, "tiny")
    assert (found.alarms, found.judged, found.low) == (0, 80, 0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 80))


def test_where_nothing_could_be_judged_the_reason_is_told() -> None:
    busy = judged("not valid").model_copy(update={"why": "other processes"})
    with pytest.raises(BenchError, match="other processes"):
        aa.alarms_of([[busy] * 4], "tiny")


def test_every_so_many_repeats_are_judged_by_themselves(tmp_path: Path) -> None:
    """Of four repeats the first two are one run and the last two another; their trials alone."""
    folder = write_run(tmp_path, repeats=4)
    first, second = aa.judged_in_blocks(folder, 2)
    assert [j.claim for j in first] == [j.claim for j in second]
    of_both = [j for j in (*first, *second) if j.effect]
    assert of_both
    assert {j.effect.ratio.n for j in of_both if j.effect} == {2}
    assert aa.judged_in_blocks(folder, 3) != [first]
    assert len(aa.judged_in_blocks(folder, 3)) == 1


def test_time_to_come_is_as_expected_and_then_as_measured() -> None:
    clock = Clock({"streams": 100.0, "engine": 60.0})
    with clock.during("streams"):
        assert clock.left_s(share_done=0.1, spent_s=30) == 70 + 60
        assert clock.left_s(share_done=0.5, spent_s=80) == 80 + 60
        assert clock.left_s(share_done=0.0, spent_s=500) == 60
    with clock.during("engine"):
        assert clock.left_s(share_done=0.0, spent_s=0) == 60


IN_FULL = Plan(
    parts=("streams", "engine", "aa"), programs=truth.PROGRAMS, processes=PROCESSES,
    locustfiles=(generator.LOCUSTFILE,), repeats=REPEATS, pairs=PAIRS, runs=RUNS, minutes=MINUTES,
    unpinned=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"programs": truth.PROGRAMS[:1]}, "streams"),
        ({"processes": (1,)}, "streams"),
        ({"repeats": REPEATS - 1}, "streams"),
        ({"pairs": PAIRS - 1}, "engine"),
        ({"runs": RUNS - 1}, "aa"),
        ({"minutes": MINUTES - 1}, "soak"),
        ({"locustfiles": (generator.LOCUSTFILE,) * 2}, "engine"),
        ({"locustfiles": (generator.LOCUSTFILE,) * 2}, "fleet"),
    ],
)
def test_only_parts_that_are_measured_in_full_are_kept(change: dict[str, Any], part: str) -> None:
    assert IN_FULL.is_ordinary(part)
    assert not replace(IN_FULL, **change).is_ordinary(part)


def test_time_is_expected_for_the_chosen_parts_alone() -> None:
    assert list(IN_FULL.expected_s()) == ["streams", "engine", "aa"]


def test_memory_that_is_taken_once_is_no_growth() -> None:
    level = [70, 90, *[100] * 18]
    assert soak.memory_of(level).growth == 0
    rising = [100 + minute for minute in range(20)]
    assert soak.memory_of(rising).bytes_per_hour == pytest.approx(60)
    assert soak.memory_of(rising).growth == pytest.approx(60 / 119)
    with pytest.raises(BenchError, match="5 minutes"):
        soak.memory_of([1, 2, 3, 4])


def test_a_fleet_that_was_played_tells_how_many_were_in_flight() -> None:
    """Two requests of 4 s each on two replicas, of which the last ends after 5 s."""
    answers = [
        VirtualAnswer(
            index=index, asked_tokens=3, prompt_tokens=9, scheduled_s=sent_s, sent_s=sent_s,
            chunks=[(sent_s + 1, 1), (sent_s + 4, 2)], in_window=True,
        )
        for index, sent_s in enumerate((0.0, 1.0))
    ]  # fmt: skip
    play = ForecastPlay(
        key="", repeat=1, counters={}, kv_capacity_tokens=0,
        play=Play(answers=answers, window_s=(0, 1), answered_under_load=False),
    )  # fmt: skip
    row = fleet.played(fleet.Case(2, 10, 1), 0.5, play)
    assert (row.replicas, row.requests, row.output_tokens, row.cpu_s) == (2, 2, 6, 0.5)
    assert row.in_flight == pytest.approx(8 / 5 / 2)


def test_the_loads_on_fleets_differ_in_one_thing_at_a_time(tmp_path: Path) -> None:
    replicas = [c.replicas for c in fleet.CASES if c.router == "least-loaded" and c.requests == 200]
    assert replicas == [1, 2, 4, 8, 16]
    for case in (fleet.Case(1, 10, 30), fleet.Case(2, 10, 30)):
        plan = fleet._plan(case, tmp_path / "requests.jsonl")
        (engine_,) = plan.engines
        (trial,) = engine_.trials
        sent = (tmp_path / "requests.jsonl").read_text().splitlines()
        assert len(trial.traffic.schedule_s) == len(sent) == 30 * case.replicas
        rate_per_s = len(sent) / trial.traffic.schedule_s[-1]
        assert rate_per_s == pytest.approx(10 * case.replicas, rel=0.3)


def answers(pace_s: float) -> list[clients.AnswerTimes]:
    """Two requests of eleven tokens, one every `pace_s`."""
    return [clients.AnswerTimes(at, at + 0.1, at + 0.1 + 10 * pace_s, 11) for at in (0.0, 1.0)]


def test_two_tools_are_compared_pair_by_pair(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        engine.OURS: [answers(0.010), answers(0.020)],
        engine.THEIRS: [answers(0.010), answers(0.020)],
    }
    for of in (clients.rate, clients.ttft_ms, clients.tpot_ms):
        same = engine.ratio_of(found, engine.OURS, of).ratio
        assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    engine.show(found, {name: {(96.0, 22.0)} for name in found})
    said = capsys.readouterr().out
    assert "vllm bench serve: 1.000" in said
    assert said.count("they agree") == 2
    assert "the same work" not in said


def test_streams_are_shown_with_a_dash_for_what_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost = trials.Totals(delivered=[0.5], chunks=1000, worker_cpu_s=0.02, all_cpu_s=0.03)
    cost.errors.ttft_s = [0.002] * 10
    cost.errors.start_ttft_s = [0.0314] * 10
    cost.errors.server_late_s = [0.001] * 10
    sent = cost.sent(truth.Program(16), processes=2)
    assert (sent.chunks_per_s, sent.delivered) == pytest.approx((8 * 50 / 0.54, 0.5))
    assert sent.ttft_added_p99_s == pytest.approx(0.002)
    assert sent.start_ttft_added_p50_s == pytest.approx(0.0314)
    assert sent.gap_error_p99_s is None
    streams.show([sent])
    said = capsys.readouterr().out
    assert "20.0" in said
    assert said.count("31.40") == 2
    assert "–" in said
    assert "p99 at most 1 ms; it is 2 ms: not" in said


def test_what_is_read_from_a_file_was_disturbed_by_nobody() -> None:
    busy: Any = SimpleNamespace(shares=lambda: (0.1, 0.3))
    share = instruments.Overhead(lab="tiny", share=0.05)
    assert dated(share, busy).cpu_others == 0
    recorded = instruments.Recording(
        tokens_per_s=9000, share=Interval(value=0.02, low=None, high=None, n=1)
    )
    assert dated(recorded, busy).cpu_others == pytest.approx(0.4)


def test_the_programs_that_are_started_are_there() -> None:
    assert find_spec(f"{truth.SERVER}.__main__")
    assert recording.UNRECORDED.is_file()


@pytest.mark.parametrize(("share", "error"), [(0.5, None), (None, None), (0.5, "reset")])
def test_a_chunk_takes_the_servers_cpu_time_in_the_window_over_its_chunks(
    share: float | None, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three chunks lie in a window of 10 s, in which the server used half a core."""

    class Servers:
        def __init__(self, pids: Sequence[int]) -> None:
            assert pids == [7]

        def read(self) -> None:
            pass

        def busiest(self, start_s: float, end_s: float) -> float | None:
            assert (start_s, end_s) == (110.0, 120.0)
            return share

    def play(planned: TrialPlan, waiting: Callable[[], None]) -> TrialSummary:
        waiting()
        chunks = [(9.9, 1), (10.1, 1), (10.2, 1)]
        records.write(planned.records, [make_record(chunks, error=error)])
        return make_summary(started_monotonic_s=100.0)

    monkeypatch.setattr(api_server, "ServerLoad", Servers)
    engine: Any = SimpleNamespace(url="", api_servers=lambda: [7])
    load: Any = SimpleNamespace(generator=SimpleNamespace(play=play))
    if not share or error:
        with pytest.raises(BenchError):
            api_server.answering(engine, load, 16, tmp_path)
        return
    row = api_server.answering(engine, load, 16, tmp_path)
    assert (row.streams, row.core_share) == (16, 0.5)
    assert (row.chunks_per_s, row.cpu_s_per_chunk) == pytest.approx((0.2, 2.5))
