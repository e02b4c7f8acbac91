"""What `make bench` leaves on file, and how results/README.md shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from labs.harness.analysis.verdicts import Interval
from labs.harness.reports import instruments
from labs.harness.reports.instruments import Alarms, Engine, Sent, Streams
from labs.harness.storage import results
from serving.hardware.machine import Machine

MACHINE = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=24 * 2**30)
DAY = "2026-11-25T19:30:00+00:00"


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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def test_a_part_replaces_itself_and_leaves_the_others(home: Path) -> None:
    instruments.keep(MACHINE, "streams", Streams(rows=[ROW], measured_at=DAY))
    path = home / MACHINE.slug / "bench.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"older": {"share": 0.1}}))
    instruments.keep(MACHINE, "aa", ALARMS.model_copy(update={"alarms": 9}))
    assert instruments.keep(MACHINE, "aa", ALARMS) == path
    assert json.loads(path.read_text())["older"] == {"share": 0.1}
    (found,) = instruments.published_benches()
    assert found.machine == MACHINE
    assert found.streams == Streams(rows=[ROW], measured_at=DAY)
    assert found.aa == ALARMS
    assert found.engine is None


def lines(bench: instruments.Bench) -> list[str]:
    """As results/README.md shows it."""
    return instruments.told([bench]).splitlines()


def test_a_row_has_units_and_a_dash_for_what_is_not_there(home: Path) -> None:
    instruments.keep(MACHINE, "streams", Streams(rows=[ROW], measured_at=DAY))
    head, _, table_head, _, row = lines(*instruments.published_benches())
    assert head == f"**{MACHINE.describe()}**, 2026-11-25:"
    assert row == (
        "| 2 | 64, a chunk every 10 ms, 4 tokens each, SSE comments | 5,926 | 99.7% | 0 | 0.81 ms"
        " | 5.2 ms | 0.1 ms | – | 21.6 µs |"
    )
    assert table_head.count("|") == row.count("|")


def test_each_part_is_a_sentence_and_one_that_was_not_measured_is_none() -> None:
    empty = instruments.Bench(machine=MACHINE)
    throughput, ttft, tpot = (
        Interval(value=value, low=low, high=high, n=4)
        for value, low, high in ((1.01, 0.99, 1.03), (0.9, None, None), (1.0, None, None))
    )
    engine = Engine(throughput=throughput, ttft=ttft, tpot=tpot)
    whole = empty.model_copy(update={"engine": engine, "aa": ALARMS})
    of_engine, of_aa = (line for line in lines(whole) if line.startswith("- "))
    assert re.search(r"1\.01 \(0\.99 to 1\.03\).*0\.90.*1\.00", of_engine)
    assert "2 of 80 claims judged, 2.5% (0.3% to 8.7%), 1 not judged" in of_aa
    assert not [line for line in lines(empty) if line.startswith("- ")]
