"""Request-level metrics on hand-made traces, and the file of records."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loadtests import records
from loadtests.records import OPTIONAL, RequestRecord, read, write
from tests.cases import each
from tests.unit.builders import make_record

ROOT = Path(__file__).resolve().parents[2]

# sent late at 10.2 instead of 10: 2 tokens at 10.5, 3 tokens at 10.8, 1 token at 10.9
TRACE = [(10.5, 2), (10.8, 3), (10.9, 1)]
CLOSED = make_record(TRACE, sent_s=10.2)
OPEN = make_record(TRACE, sent_s=10.2, scheduled_s=10.0)
FAILED = make_record([])


def test_figures_of_a_request_by_hand() -> None:
    """From the schedule under open loop, from the send under closed; up to the last token."""
    assert (OPEN.ttft_s, CLOSED.ttft_s) == pytest.approx((0.5, 0.3))
    assert (OPEN.e2e_s, CLOSED.e2e_s) == pytest.approx((0.9, 0.7))
    assert make_record(TRACE, end_s=99.0).e2e_s == pytest.approx(0.9)
    assert OPEN.send_lag_s == pytest.approx(0.2)
    assert CLOSED.send_lag_s is None
    assert CLOSED.itl_s == pytest.approx([0.1] * 4)  # a chunk of k tokens has k intervals
    assert CLOSED.chunk_gaps_s == pytest.approx([0.3, 0.1])
    assert CLOSED.tpot_s == pytest.approx(0.4 / 4)  # without the first chunk's time and tokens
    # chunks without usage count as one token each; the answer had 9
    assert make_record([(10.5, 1), (10.9, 1)], output_tokens=9).tpot_s == pytest.approx(0.4 / 8)


def test_what_has_no_figure_has_none_rather_than_zero() -> None:
    for tokens in (1, 5):
        one = make_record([(10.5, tokens)])
        assert (one.tpot_s, one.itl_s, one.chunk_gaps_s) == (None, [], [])
        assert one.ttft_s == one.e2e_s == 0.5
    assert (FAILED.ttft_s, FAILED.tpot_s, FAILED.e2e_s) == (None, None, None)
    assert (FAILED.itl_s, FAILED.chunk_gaps_s) == ([], [])
    assert CLOSED.ok
    broken = (FAILED, make_record(TRACE, error="reset"), make_record([], error=None))
    assert not any(record.ok for record in broken)


# ------------------------------------------------------------------------------------- the file


def test_records_read_back_as_they_were(tmp_path: Path) -> None:
    kept = make_record(TRACE, text="[amber] so", first_answer_s=10.8)
    write(tmp_path / "r.gz", [OPEN, kept, FAILED])
    assert list(read(tmp_path / "r.gz")) == [OPEN, kept, FAILED]


def test_rewriting_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.gz", [OPEN, FAILED])
    write(tmp_path / "b.gz", read(tmp_path / "a.gz"))
    first = (tmp_path / "a.gz").read_bytes()
    assert (tmp_path / "b.gz").read_bytes() == first
    assert first[4:8] == bytes(4)  # gzip's time stamp


def test_file_holds_one_json_object_a_line_under_the_fields_names(tmp_path: Path) -> None:
    write(tmp_path / "r.gz", [OPEN])
    (line,) = gzip.decompress((tmp_path / "r.gz").read_bytes()).splitlines()
    found = json.loads(line)
    assert list(found) == [f.name for f in fields(RequestRecord) if f.name not in OPTIONAL]
    assert found["chunks"] == [[10.5, 2], [10.8, 3], [10.9, 1]]


@pytest.mark.parametrize("damage", [b'{"index": 1', b"5", b'{"index": 1}', b'{"chunks": [[1]]}'])
def test_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path / "r.gz", [OPEN])
    good = gzip.decompress((tmp_path / "r.gz").read_bytes())
    (tmp_path / "r.gz").write_bytes(gzip.compress(good + damage + b"\n" + good))
    with pytest.raises(ValueError, match=r"r\.gz, line 2: "):
        list(read(tmp_path / "r.gz"))


def line_of(**fields: Any) -> bytes:
    return json.dumps({**OPEN.fields, **fields}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (line_of(asked_tokens=2, chunks=[[10.5, 1]] * 21), "21 chunks for 2"),
        (line_of(text="x" * 16 * 2**20), "too long"),
        (line_of().replace(b"[[10.5", b"[" + 2**20 * b"[0,0]," + b"[10.5"), "too long"),
        (line_of(asked_tokens=99, chunks=[[0, 0]] * 60), "more than 50"),
    ],
    ids=["chunks", "text", "dense", "in all"],
)
def test_what_would_fill_the_memory_is_refused_while_it_is_read(
    line: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six bytes are a chunk, which takes a hundred in memory."""
    monkeypatch.setattr(records, "MOST_CHUNKS", 50)
    (tmp_path / "r.gz").write_bytes(gzip.compress(line_of() + line + line_of() * 9, 1))
    del line
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"r\.gz, line 2: .*{why}"):
        list(read(tmp_path / "r.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_as_many_chunks_as_were_asked_for_can_be_read(tmp_path: Path) -> None:
    answered = make_record([(10.5 + i / 100, 1) for i in range(40)])
    write(tmp_path / "r.gz", [answered] * 3)
    assert list(read(tmp_path / "r.gz")) == [answered] * 3


def test_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "r.gz", [OPEN] * 100)
    whole = (tmp_path / "r.gz").read_bytes()
    (tmp_path / "r.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"r\.gz"):
        list(read(tmp_path / "r.gz"))


def test_interrupted_writing_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted() -> Iterator[RequestRecord]:
        yield CLOSED
        raise KeyboardInterrupt

    write(tmp_path / "r.gz", [OPEN])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "r.gz", interrupted())
    assert list(read(tmp_path / "r.gz")) == [OPEN]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new.gz", interrupted())
    assert list(tmp_path.iterdir()) == [tmp_path / "r.gz"]


def test_two_processes_that_write_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "r.gz", os.getpid() + 1

    def meanwhile() -> Iterator[RequestRecord]:
        yield CLOSED
        monkeypatch.setattr(os, "getpid", lambda: other)
        write(path, [OPEN])
        assert list(read(path)) == [OPEN]

    write(path, meanwhile())
    assert list(read(path)) == [CLOSED]
    assert list(tmp_path.iterdir()) == [path]


def test_records_that_come_one_by_one_are_in_the_same_file_and_not_in_memory(
    tmp_path: Path,
) -> None:
    write(tmp_path / "whole.gz", [OPEN, FAILED] * 10_000)
    spool = records.Spool(tmp_path / "trial" / "spooled.gz")
    assert not os.listdir(tmp_path / "trial")  # what is half done has no name
    tracemalloc.start()
    for _ in range(10_000):
        spool.add(OPEN)
        spool.add(FAILED)
    spool.pack()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    spooled = (tmp_path / "trial" / "spooled.gz").read_bytes()
    assert spooled == (tmp_path / "whole.gz").read_bytes()
    assert peak < 2**20


def test_no_more_is_written_down_than_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour's trial ended in records that its own report refused."""
    assert records.MOST_CHUNKS >= 3600 * 10_000
    monkeypatch.setattr(records, "MOST_CHUNKS", 2 * len(OPEN.chunks))
    spool = records.Spool(tmp_path / "r.gz")
    for _ in range(2):
        spool.add(OPEN)
    with pytest.raises(OSError, match=r"\d+ chunks, .*: shorten"):
        spool.add(OPEN)
    spool.pack()
    assert list(read(tmp_path / "r.gz")) == [OPEN] * 2


def test_records_for_which_there_is_no_room_are_told_and_dropped(tmp_path: Path) -> None:
    spool = records.Spool(tmp_path / "r.gz")
    spool._lines = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        spool.add(OPEN)
    spool.close()
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------- from the stream's lines

_SERVE = """
import json, sys
from loadtests.streaming import tokens_of
for line in sys.stdin:
    lines = [(at, text.encode()) for at, text in json.loads(line)]
    try:
        answer = tokens_of(lines, 100.0, 5)
    except Exception as error:
        answer = [repr(error)]
    print(json.dumps(answer), flush=True)
"""
Parse = Callable[[list[tuple[float, str]]], list[Any]]


@pytest.fixture(scope="module")
def tokens_of() -> Iterator[Parse]:
    """`loadtests.streaming.tokens_of`, in a process of its own: Locust patches the one it is in.

    The trial began at 100 on the process's clock; the request asked for 5 tokens.
    """
    argv = [sys.executable, "-c", _SERVE]
    with subprocess.Popen(
        argv, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin
        assert child.stdout
        talk = child.stdin, child.stdout

        def ask(lines: list[tuple[float, str]]) -> list[Any]:
            talk[0].write(json.dumps(lines) + "\n")
            talk[0].flush()
            return list(json.loads(talk[1].readline()))

        yield ask
        child.stdin.close()


def sse(delta: Mapping[str, str | None] | None, tokens: int | None = None) -> str:
    """One event: a delta of the first choice (None: no choice), and the usage so far."""
    event: dict[str, Any] = {"choices": [] if delta is None else [{"index": 0, "delta": delta}]}
    if tokens is not None:
        event["usage"] = {"prompt_tokens": 9, "completion_tokens": tokens}
    return f"data: {json.dumps(event)}\n"


ROLE, TEXT = {"role": "assistant", "content": ""}, {"content": "and"}


@each(
    ("events", "expected"),
    [
        ([sse(ROLE, 0), sse(TEXT, 1), "data: [DONE]\n"], [[[2.0, 1]], 9, 1, None]),
        ([sse(ROLE), sse(TEXT)], [[[2.0, 1]], None, None, None]),  # the role is no token
        ([sse(TEXT, 1), sse(TEXT, 5), sse(TEXT, 5)], [[[1.0, 1], [2.0, 4]], 9, 5, None]),
        # half of a multi-byte character, or a special token: the engine has made it
        ([sse({"content": ""}, 1)], [[[1.0, 1]], 9, 1, None]),
        ([sse(TEXT, 1), sse(None, 1)], [[[1.0, 1]], 9, 1, None]),  # the closing usage is no chunk
        ([sse(TEXT), sse(None, 3)], [[[1.0, 1]], 9, 3, None]),
        ([": ping\n", sse(TEXT, 1)], [[[2.0, 1]], 9, 1, None]),
        ([sse(TEXT, 1), 'data: {"error": "no memory"}\n'], [[[1.0, 1]], 9, 1, "no memory"]),
        ([sse(TEXT, 1).replace("{", '{"error": null, ', 1)], [[[1.0, 1]], 9, 1, None]),
    ],
)
def test_chunks_are_the_growth_of_the_usage(
    tokens_of: Parse, events: list[str], expected: list[object]
) -> None:
    assert tokens_of([*enumerate(events, 101)]) == expected


THOUGHT: dict[str, str | None] = {"reasoning": "so", "content": None}
OLDER = {"reasoning_content": "so"}
_RECORD = """
import json, sys
from types import SimpleNamespace
from loadtests.streaming import record_of
turn = SimpleNamespace(
    due_s=None, counts=True,
    request=SimpleNamespace(index=0, output_tokens=5, alike_tokens=None),
)
plan = SimpleNamespace(keep_text=True, model_names={}, secrets="")
load = SimpleNamespace(t0=100.0, plan=plan)
for stream in json.load(sys.stdin):
    lines = [(float(at), text.encode()) for at, text in stream]
    record = record_of(turn, load, (100.5, 101.0, 110.0), lines, None, None)
    print(json.dumps([record.error, record.ttft_s, record.ttfa_s, [*record.chunks], record.text]))
"""


def test_reasoning_is_output_and_where_the_answer_begins_is_recorded() -> None:
    role, end = sse(ROLE), sse(None, 3)
    counted = [sse(ROLE, 0), sse(THOUGHT, 1), sse(THOUGHT, 2), sse(TEXT, 3)]
    streams = [
        [role, sse(THOUGHT), sse(THOUGHT), sse(TEXT), end],
        [role, sse(OLDER), sse(OLDER), sse(TEXT), end],
        counted,
        [role, sse(THOUGHT), sse(THOUGHT), sse({**OLDER, **TEXT}), end],  # the last of it
        [role, sse(THOUGHT), sse(THOUGHT), sse(OLDER), end],  # no answer within what was asked for
        [role, sse({**TEXT, "reasoning": ""}), sse(TEXT), sse({**TEXT, "reasoning": None}), end],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _RECORD], cwd=ROOT, text=True, capture_output=True, check=True,
        input=json.dumps([[*enumerate(stream, 101)] for stream in streams]),
    )  # fmt: skip
    chunks = [[2.0, 1], [3.0, 1], [4.0, 1]]
    reasoned = [None, 1.5, 3.5, chunks, "and"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        *[reasoned] * 4,
        [None, 1.5, None, chunks, ""],
        [None, 1.5, None, chunks, "andandand"],
    ]


def test_a_refusal_for_lack_of_room_may_come_within_a_stream(tokens_of: Parse) -> None:
    """vLLM checks the limits on its queue once more when its answer, of status 200, has begun."""
    refusal = {"message": "busy", "type": "Service Unavailable", "param": None, "code": 503}
    for code, turned_away in ((503, True), (429, True), (500, False)):
        line = f"data: {json.dumps({'error': {**refusal, 'code': code}})}\n"
        chunks, _, _, complaint = tokens_of([(101.0, line)])
        assert not chunks
        assert complaint
        assert "busy" in complaint
        assert make_record([], error=complaint).turned_away == turned_away


@each(
    "event",
    ["<html>", "5", '{"choices": [{"delta": null}]}',
     '{"choices": [{}], "usage": {"prompt_tokens": 3}}'],
)  # fmt: skip
def test_event_of_another_shape_keeps_the_earlier_chunks(tokens_of: Parse, event: str) -> None:
    chunks, _, _, complaint = tokens_of([(101.0, sse(TEXT, 1)), (102.0, f"data: {event}\n")])
    assert chunks == [[1.0, 1]]
    assert event != "<html>" or event in complaint


@each("counts", [(9, -1), (-9, 1), (9, 1.5), (9, "2"), (9, True), (9, 2_000_000_000), (9, None)])
def test_a_usage_that_cannot_be_is_no_count(
    tokens_of: Parse, counts: tuple[object, object]
) -> None:
    """However many tokens it claims, no sample is made of each."""
    usage = dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))
    event = {"choices": [{"index": 0, "delta": TEXT}], "usage": usage}
    lines = [(101.0, sse(TEXT, 1)), (102.0, f"data: {json.dumps(event)}\n")]
    chunks, prompt_tokens, output_tokens, complaint = tokens_of(lines)
    assert (chunks, prompt_tokens, output_tokens) == ([[1.0, 1]], None, None)
    assert complaint.startswith("not a usage")


def test_a_usage_that_falls_is_no_count(tokens_of: Parse) -> None:
    lines = [(101.0, sse(TEXT, 3)), (102.0, sse(TEXT, 2))]
    assert tokens_of(lines)[0] == [[1.0, 3]]
    assert tokens_of(lines)[3].startswith("not a usage")
