"""Traces as they are published."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from labs.harness.cli.options import trace_of
from loadtests import trace
from loadtests.trace import read_trace

PLAIN = "timestamp,input_tokens,output_tokens\n1.5,100,20\n1.0,50,10\n2.25,70,30\n"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}
"""


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_times_count_from_the_first_request_in_their_order(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, PLAIN)) == ((0.0, 50, 10), (0.5, 100, 20), (1.25, 70, 30))


def test_azures_columns_and_dates(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert first == (0.0, 374, 44)
    assert second[0] == pytest.approx(4.314579, abs=1e-5)
    assert second[1:] == (396, 109)


def test_mooncakes_milliseconds(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE, "trace.jsonl"))
    assert trace == ((0.0, 6955, 52), (3.053, 6472, 26))


def test_a_request_without_an_answer_is_left_out(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, PLAIN + "9,80,0\n")) == read_trace(written(tmp_path, PLAIN))


def test_a_mark_of_the_order_of_bytes_is_read_over(tmp_path: Path) -> None:
    """As spreadsheets write it."""
    for text, name in ((PLAIN, "t.csv"), (MOONCAKE, "t.jsonl")):
        marked = written(tmp_path, f"\ufeff{text}", f"marked-{name}")
        assert read_trace(marked) == read_trace(written(tmp_path, text, name))


def test_behind_requests_in_order_none_is_read(tmp_path: Path) -> None:
    """Of twice as many as are used: if these come in another order, an early one may come last."""
    rows = "".join(f"{at},8,8\n" for at in range(6))
    path = written(tmp_path, f"timestamp,input_tokens,output_tokens\n{rows}this is none\n")
    assert [row[0] for row in read_trace(path, 3)] == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="request 7"):
        read_trace(path, 4)


def test_a_long_reading_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "TOLD_EVERY", 2)
    told = list[str]()
    read_trace(written(tmp_path, PLAIN), tell=told.append)
    assert ["2 requests" in text for text in told] == [True]


def test_a_long_trace_is_kept_from_its_beginning(tmp_path: Path) -> None:
    """By time, whatever the order in the file: the earliest may come last."""
    assert [row[0] for row in read_trace(written(tmp_path, PLAIN), 2)] == [0.0, 0.5]
    shuffled = sorted(range(50), key=lambda at: at * 37 % 50)
    text = "timestamp,input_tokens,output_tokens\n" + "".join(f"{at},8,8\n" for at in shuffled)
    assert [row[0] for row in read_trace(written(tmp_path, text), 3)] == [0.0, 1.0, 2.0]


def test_a_plan_reads_more_of_a_trace_than_a_run(tmp_path: Path) -> None:
    """A run files every row, and writes and sends a prompt for it; a plan does neither."""
    rows = "".join(f"{at},8,8\n" for at in range(trace.MOST_ROWS + 1))
    path = written(tmp_path, f"timestamp,input_tokens,output_tokens\n{rows}")
    assert len(read_trace(path)) == trace.MOST_ROWS
    assert len(trace_of(path, print)) == trace.MOST_ROWS + 1


def test_no_more_of_a_trace_is_in_memory_than_is_kept(tmp_path: Path) -> None:
    """The first request comes last."""
    later = "".join(f"{2 + i},100,20\n" for i in range(20_000))
    path = written(tmp_path, PLAIN + later + "0.5,60,10\n")
    tracemalloc.start()
    kept = read_trace(path, most_rows=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == ((0.0, 60, 10), (0.5, 50, 10), (1.0, 100, 20))
    assert peak < 2**20


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_line_that_no_request_has_is_not_parsed(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, "[" + 2**22 * "[],", name)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"line 1: .* 262144 "):
        read_trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_request_does_not_go_on_over_many_lines(tmp_path: Path) -> None:
    text = PLAIN + 2**16 * '1,"\n'
    with pytest.raises(ValueError, match=r"line 5: .*quotation"):
        read_trace(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("at,in,out\n1,2,3\n", "t.csv", "at, in, out; .*timestamp, input"),
        (PLAIN + "3,many,5\n", "t.csv", "request 4: .*many"),
        ("timestamp,input_tokens,output_tokens\nnoon,2,5\n", "t.csv", "request 1: .*noon"),
        ("timestamp,input_tokens,output_tokens\n1,2\n", "t.csv", "request 1: "),
        ("timestamp,input_tokens,output_tokens\n", "t.csv", "holds no requests"),
        ("not json\n", "t.jsonl", "t.jsonl cannot be read"),
        (PLAIN + "nan,2,5\n", "t.csv", "request 4: nan is no time"),
        (PLAIN + "-inf,2,5\n", "t.csv", "request 4: -inf is no time"),
        (PLAIN + "1e999,2,5\n", "t.csv", "request 4: 1e999 is no time"),
        (PLAIN + "3,-2,5\n", "t.csv", "request 4: fewer"),
        (PLAIN + "3,2,-5\n", "t.csv", "request 4: fewer"),
        (PLAIN + "3,99999999999,5\n", "t.csv", "request 4: .* 10000000 "),
        (PLAIN + "2024-01-01,2,5\n", "t.csv", "request 4: its time"),
        (AZURE + "2023-11-16T18:15:51+02:00,2,5\n", "t.csv", "request 3: its time"),
        (PLAIN + "1,2\n3,4,5\n", "t.csv", "request 4: "),
        (PLAIN + f'"{"1" * 200_000}",2,3\n', "t.csv", "field larger"),
        (MOONCAKE + "[1, 2, 3]\n", "t.jsonl", "request 3: "),
        (MOONCAKE.replace("27482", "Infinity"), "t.jsonl", "request 1: inf is no time"),
        (MOONCAKE.replace("6955", "[1]"), "t.jsonl", "request 1: "),
        (MOONCAKE.replace("6955", "1e999"), "t.jsonl", "request 1: "),
        ("[" * 100_000 + "\n", "t.jsonl", "t.jsonl cannot be read"),
    ],
)
def test_what_is_wrong_is_named(text: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(written(tmp_path, text, name))


def test_what_is_not_there_or_has_no_end_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="regular file"):
            read_trace(path)


def test_a_trace_that_would_fill_the_memory_is_refused_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="0 MiB: give"):
        read_trace(written(tmp_path, PLAIN))
