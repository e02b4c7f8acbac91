"""The bench's statistics, on hand-made records."""

from __future__ import annotations

from typing import Any

import pytest

from loadtests.records import RequestRecord
from tests import bench


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
