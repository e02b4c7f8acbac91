"""What `make bench` leaves on file, and how results/README.md shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labs.harness.filing import results
from labs.harness.judging.judge import Interval
from labs.harness.telling import instruments, markdown
from labs.harness.telling.instruments import (
    Alarms,
    Answering,
    Engine,
    Fleet,
    Memory,
    Neighbour,
    Overhead,
    Played,
    Recording,
    Sent,
    Server,
    Soak,
    Streams,
)
from serving.hardware.machine import Machine

MACHINE = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=24 * 2**30)
DAY = "2026-11-25T19:30:00+00:00"


def ratio(value: float, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(value=value, low=low, high=high, n=4)


ROW = Sent(
    load_processes=2, streams=64, gap_s=0.01, tokens_per_chunk=4, shape="SSE comments",
    chunks_per_s=5926.4, delivered=0.997, lost=0, ttft_added_p50_s=0.00081,
    ttft_added_p99_s=0.0052, read_late_p50_s=0.0001, read_late_p99_s=0.002,
    gap_error_p50_s=0.0001, gap_error_p99_s=None, server_late_p99_s=0.001,
    cpu_s_per_chunk=21.64e-6, all_cpu_s_per_chunk=30e-6,
)  # fmt: skip
ALARMS = Alarms(
    lab="tiny", runs=20, alarms=2, judged=80, not_judged=1, low=0.003, high=0.087, spread=0.021,
    measured_at=DAY,
)  # fmt: skip
SOAK = Soak(
    minutes=60, streams=64, requests=420_000,
    sending=Memory(most_bytes=200_000_000, bytes_per_hour=-3e6),
    recording=Memory(most_bytes=100_000_000, bytes_per_hour=1e6),
)  # fmt: skip
FLEET = Fleet(
    vllm="0.32.0", import_s=9.04, build_s=0.251, held_bytes=900_000_000,
    rows=[
        Played(
            router="least-loaded", replicas=16, rate_per_s=10, requests=3200,
            output_tokens=640_000, in_flight=20.04, cpu_s=32,
        )
    ],
)  # fmt: skip
SERVER = Server(
    vllm="0.32.0",
    rows=[
        Answering(streams=16, chunks_per_s=700, core_share=0.13, cpu_s_per_chunk=187e-6),
        Answering(streams=256, chunks_per_s=4000, core_share=0.8, cpu_s_per_chunk=200e-6),
    ],
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def test_a_part_replaces_itself_and_leaves_the_others(home: Path) -> None:
    instruments.keep(MACHINE, "streams", Streams(rows=[ROW], measured_at=DAY))
    instruments.keep(MACHINE, "aa", ALARMS.model_copy(update={"alarms": 9}))
    path = instruments.keep(MACHINE, "aa", ALARMS)
    assert path == home / MACHINE.slug / "bench.json"
    (found,) = instruments.published_benches()
    assert found.machine == MACHINE
    assert found.streams == Streams(rows=[ROW], measured_at=DAY)
    assert found.aa == ALARMS
    assert found.engine is None


def lines(bench: instruments.Bench) -> list[str]:
    """As results/README.md shows it."""
    return markdown.fragment(instruments.blocks(bench)).splitlines()


def test_a_row_has_units_and_a_dash_for_what_is_not_there(home: Path) -> None:
    instruments.keep(MACHINE, "streams", Streams(rows=[ROW], measured_at=DAY))
    head, _, table_head, _, row, *_ = lines(*instruments.published_benches())
    assert head == f"**{MACHINE.describe()}**, 2026-11-25:"
    assert row == (
        "| 2 | 64, a chunk every 10 ms, 4 tokens each, SSE comments | 5,926 | 99.7% | 0 | 0.81 ms"
        " | 5.2 ms | 0.1 ms | – | 21.6 µs |"
    )
    assert table_head.count("|") == row.count("|")


def test_the_start_of_all_streams_has_columns_where_a_row_has_timed_it(home: Path) -> None:
    timed = ROW.model_copy(
        update={"start_ttft_added_p50_s": 0.0214, "start_ttft_added_p99_s": 0.042}
    )
    instruments.keep(MACHINE, "streams", Streams(rows=[ROW], measured_at=DAY))
    older = instruments.path_of(MACHINE)
    older.write_text(re.sub(r'\s*"start_\w+": null,', "", older.read_text()))
    assert "start" not in older.read_text()
    (bench,) = instruments.published_benches()
    assert "At the start" not in lines(bench)[2]
    both = bench.model_copy(update={"streams": Streams(rows=[ROW, timed], measured_at=DAY)})
    _, _, table_head, _, untimed, row, *_ = lines(both)
    assert "At the start" in table_head
    assert "| 5.2 ms | – | – | 0.1 ms |" in untimed
    assert "| 5.2 ms | 21.4 ms | 42 ms | 0.1 ms |" in row
    assert table_head.count("|") == untimed.count("|") == row.count("|")


def test_each_part_is_a_sentence_and_one_that_was_not_measured_is_none() -> None:
    empty = instruments.Bench(machine=MACHINE)
    whole = empty.model_copy(
        update={
            "engine": Engine(throughput=ratio(1.01, 0.99, 1.03), ttft=ratio(0.9), tpot=ratio(1.0)),
            "neighbour": Neighbour(throughput=ratio(0.995, 0.98, 1.01)),
            "recording": Recording(tokens_per_s=9980, share=ratio(0.021, 0.015, 0.027)),
            "overhead": Overhead(lab="tiny", share=0.07),
            "aa": ALARMS,
            "soak": SOAK,
            "fleet": FLEET,
            "server": SERVER,
        }
    )
    sentences = [line for line in lines(whole) if line.startswith("- ")]
    figures = (
        "1.01 (0.99 to 1.03).*0.90.*1.00",
        "0.99 (0.98 to 1.01)",
        "2.1% (1.5% to 2.7%).*9,980 tokens/s",
        "`tiny`.*7.0%",
        "2 of 80.*2.5% (0.3% to 8.7%), 1 not judged",
        "60 minutes.*64 streams, 420,000.*200 MB and shrank by 1.5%.*100 MB and grew by 1.0%",
        "0.32.0.*9.0 s.*0.25 s.*900 MB",
        "187 µs, 200 µs.*16, 256 streams.*5,300, 5,000 chunks/s",
    )
    *_, header, _, row = lines(whole)
    assert header.count("|") == row.count("|")
    assert row == "| least-loaded | 16 | 10 | 20.0 | 3,200 | 32.0 s | 100.0 | 50 µs |"
    for sentence, pattern in zip(sentences, figures, strict=True):
        assert re.search(pattern.replace("(", r"\(").replace(")", r"\)"), sentence), sentence
    assert not [line for line in lines(empty) if line.startswith("- ")]


def test_work_of_others_is_told() -> None:
    for share, told in ((0.04, False), (0.21, True)):
        aa = ALARMS.model_copy(update={"cpu_others": share})
        head = lines(instruments.Bench(machine=MACHINE, aa=aa))[0]
        assert (f"{share:.0%}" in head) is told
