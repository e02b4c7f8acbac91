"""The bench's statistics, on hand-made records."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from bench import BenchError, engine, trials, truth
from bench import __main__ as command
from labs.harness.reports import instruments
from loadtests.records import Chunks, RequestRecord


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
    answers = [engine.AnswerTimes(10, 11, 14, 4), engine.AnswerTimes(12, 14, 20, 4)]
    assert engine.rate(answers) == pytest.approx(0.8)
    assert engine.ttft_ms(answers) == pytest.approx(1500)
    assert engine.tpot_ms(answers) == pytest.approx(1500)


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


def answers(pace_s: float) -> list[engine.AnswerTimes]:
    """Two requests of eleven tokens, one every `pace_s`."""
    return [engine.AnswerTimes(at, at + 0.1, at + 0.1 + 10 * pace_s, 11) for at in (0.0, 1.0)]


def test_two_tools_are_compared_pair_by_pair() -> None:
    found = {
        engine.OURS: [answers(0.010), answers(0.020)],
        engine.THEIRS: [answers(0.010), answers(0.020)],
    }
    for of in (engine.rate, engine.ttft_ms, engine.tpot_ms):
        same = engine.ratio_of(found, of)
        assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))


def test_what_is_not_there_is_none() -> None:
    cost = trials.Totals(delivered=[0.5], chunks=1000, worker_cpu_s=0.02, all_cpu_s=0.03)
    cost.errors.ttft_s = [0.002] * 10
    cost.errors.start_ttft_s = [0.0314] * 10
    sent = cost.sent(truth.Program(16), processes=2)
    assert (sent.chunks_per_s, sent.delivered) == pytest.approx((8 * 50 / 0.54, 0.5))
    assert sent.ttft_added_p99_s == pytest.approx(0.002)
    assert sent.start_ttft_added_p50_s == pytest.approx(0.0314)
    assert sent.gap_error_p99_s is None


def test_the_server_that_is_started_is_there() -> None:
    assert find_spec(f"{truth.SERVER}.__main__")


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(typer.BadParameter, match="fleet"):
        command.main(["fleet"])


def test_a_part_that_fails_is_told_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(work: Path) -> instruments.Streams:
        raise BenchError("too busy")

    monkeypatch.setitem(command.PARTS, "streams", fails)
    monkeypatch.setattr(instruments, "keep", lambda *_: pytest.fail("kept"))
    assert not command.measured("streams", tmp_path)
    assert "too busy" in capsys.readouterr().out
