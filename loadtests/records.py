"""Defines the record of a request, and each request-level metric.

All times are seconds on the load process's monotonic clock, counted from the start of the trial,
taken as bytes are read from the socket. The file holds one JSON object per line with the fields of
`RequestRecord` under their own names, and `chunks` as [[time_s, tokens], ...].

Definitions (tools differ; these are ours):

- TTFT: first chunk that carries an output token, from the scheduled time under open loop (so that
  a late generator cannot hide a queue: no coordinated omission), from the send under closed loop.
  The role-only chunk that vLLM sends first is not a token; reasoning before an answer is.
- TTFA: as TTFT, to the first chunk of the answer where reasoning was sent before it.
- ITL: a chunk of k tokens after a gap g counts as k samples of g / k.
- TPOT: (last - first) / (output tokens - tokens in the first chunk).
- E2E: last - scheduled (or sent).
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import os
import tempfile
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import sub
from pathlib import Path
from typing import IO, Any, overload

import orjson

BY_CLIENT = "not sent"
"""How the error of a request begins that the load generator turned away: `loadtests/admission.py`.
"""
TURNED_AWAY = ("HTTP 503", "HTTP 429", BY_CLIENT)
"""How the error of a request begins that was turned away, as there was no room for it."""
OPTIONAL = ("text", "model", "choice", "alike_tokens", "first_answer_s")
"""What is left out of a line where it is None."""
LONGEST_S = 7 * 24 * 3600.0  # a trial, its window, its warm-up or a timeout
MOST_TOKENS = 10_000_000  # of a request
SPOOL_BYTES = 2**18  # written to disk at once
MOST_CHUNKS = 40_000_000  # of the requests of a trial together: an hour at 11,000 a second
MOST_LINE_BYTES = 16 * 2**20  # of a request
MOST_VALUES = 2_000_000  # of a request, by its commas and brackets: a chunk has three


class Chunks(Sequence[tuple[float, int]]):
    """The chunks of an answer that carry tokens, as (arrival, output tokens), in two columns.

    A trial may have millions: here one takes 16 bytes, and as a tuple over 80.
    """

    __slots__ = ("times_s", "tokens")
    times_s: array[float]
    tokens: array[int]

    def __init__(self, chunks: Iterable[tuple[float, int]]) -> None:
        """Take pairs. Raises ValueError or TypeError where they are none of numbers."""
        pairs = list(chunks)
        self.times_s = array("d", [time_s for time_s, _ in pairs])
        self.tokens = array("q", [tokens for _, tokens in pairs])

    @overload
    def __getitem__(self, at: int) -> tuple[float, int]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[float, int]]: ...
    def __getitem__(self, at: int | slice) -> tuple[float, int] | list[tuple[float, int]]:
        if isinstance(at, slice):
            return list(zip(self.times_s[at], self.tokens[at], strict=True))
        return self.times_s[at], self.tokens[at]

    def __iter__(self) -> Iterator[tuple[float, int]]:
        return zip(self.times_s, self.tokens, strict=True)

    def __len__(self) -> int:
        return len(self.times_s)

    def tokens_between(self, start_s: float, end_s: float, since: int = 0) -> int:
        """Count the tokens that arrive in [start_s, end_s), from the chunk `since` on."""
        first = max(since, bisect_left(self.times_s, start_s))
        return sum(self.tokens[first : bisect_left(self.times_s, end_s)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(slots=True)  # a run may have a million, and a frozen one takes twice as long to make
class RequestRecord:
    """One request as the client saw it. A field that was never reached is None, never 0.

    A request that asks for several answers has a record for each of them, as it is several requests
    to the engine. They share its index, its send, and the stream's end.
    """

    index: int
    asked_tokens: int
    scheduled_s: float | None  # None under closed loop: there is no schedule
    sent_s: float  # request handed to the socket
    chunks: Chunks
    end_s: float | None  # the stream's end
    prompt_tokens: int | None  # from the engine's usage, as output_tokens is
    output_tokens: int | None
    in_window: bool  # it counts: it was sent inside the measured window
    error: str | None = None
    first_byte_s: float | None = None  # first bytes of any kind, a role-only chunk included
    text: str | None = None  # the answer, where the plan asks to keep it
    model: str | None = None  # that answered, by its own word; None before this was recorded
    choice: int | None = None  # which of its answers this is, where it asked for several
    # of its text, beyond a planned prefix: how many another prompt of the trial begins with; None
    # where that is not known, and before it was recorded
    alike_tokens: int | None = None
    first_answer_s: float | None = None  # first text of the answer; None where no reasoning came

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> RequestRecord:
        """Make a record of plain fields. Raises TypeError and ValueError where they are none."""
        return cls(**{**fields, "chunks": Chunks(fields["chunks"])})

    @property
    def fields(self) -> dict[str, Any]:
        """All fields as plain data."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {**plain, "chunks": list(self.chunks)}

    @property
    def ok(self) -> bool:
        """Whether the request succeeded: tokens came, and no error."""
        return self.error is None and bool(self.chunks.times_s)

    @property
    def turned_away(self) -> bool:
        """Whether the server, or the client in its place, refused it for lack of room."""
        return not self.chunks and (self.error or "").startswith(TURNED_AWAY)

    @property
    def start_s(self) -> float:
        """When the user began to wait: as scheduled (open loop), or at the send (closed loop)."""
        return self.sent_s if self.scheduled_s is None else self.scheduled_s

    @property
    def over_s(self) -> float:
        """When it was over: the stream's end, or the send where there was no stream to end."""
        return self.end_s or self.sent_s

    @property
    def send_lag_s(self) -> float | None:
        """The time from the schedule to the send; None under closed loop."""
        return None if self.scheduled_s is None else self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: first chunk with a token - start."""
        times_s = self.chunks.times_s
        return times_s[0] - self.start_s if times_s else None

    @property
    def ttfa_s(self) -> float | None:
        """Time to first answer: first chunk with text of the answer, after reasoning - start."""
        return None if self.first_answer_s is None else self.first_answer_s - self.start_s

    @property
    def e2e_s(self) -> float | None:
        """End-to-end latency: last chunk - start."""
        times_s = self.chunks.times_s
        return times_s[-1] - self.start_s if times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first chunk; None where one chunk holds them all."""
        times_s, tokens = self.chunks.times_s, self.chunks.tokens
        if len(times_s) < 2:
            return None
        later_tokens: int = (self.output_tokens or sum(tokens)) - tokens[0]
        return (times_s[-1] - times_s[0]) / later_tokens if later_tokens > 0 else None

    @property
    def chunk_gaps_s(self) -> list[float]:
        """The gaps between chunks that carry tokens, which a person sees as stutter."""
        times_s = self.chunks.times_s
        return list(map(sub, times_s[1:], times_s))

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latency: one sample for each token after the first chunk."""
        gaps, sizes = self.chunk_gaps_s, self.chunks.tokens[1:]
        if sizes.count(1) == len(sizes):  # the usual case, made fast
            return gaps
        return [
            gap / tokens for gap, tokens in zip(gaps, sizes, strict=True) for _ in range(tokens)
        ]


def write(path: Path, records: Iterable[RequestRecord]) -> None:
    """Write the records as gzipped JSON lines; the file appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _pack(path, map(_line, records))


def _line(record: RequestRecord) -> bytes:
    fields = {k: v for k, v in record.fields.items() if v is not None or k not in OPTIONAL}
    return orjson.dumps(fields) + b"\n"


def _pack(path: Path, lines: Iterable[bytes]) -> None:
    # as serving/atomic.py writes a file, which nothing here may import
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    try:
        # mtime=0: the same records give the same bytes
        with half.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            for line in lines:
                file.write(line)
        half.rename(path)
    finally:
        half.unlink(missing_ok=True)


class Spool:
    """Keeps a trial's records on disk as they come, so that memory does not grow with them.

    While the load lasts they are only written down; they are compressed once it has ended. What is
    kept until then has no name, so that nothing is left of it however the process ends.
    """

    def __init__(self, path: Path) -> None:
        """Begin with none; `path` is where they are to be in the end. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lines: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 - closed by pack and close
            dir=path.parent, buffering=SPOOL_BYTES
        )
        self._chunks = 0

    def add(self, record: RequestRecord) -> None:
        """Write a record down. Raises OSError, also for more than `read` would take back."""
        self._chunks += len(record.chunks)
        if self._chunks > MOST_CHUNKS:
            raise OSError(
                f"they have more than {MOST_CHUNKS:,} chunks, the most of a trial: shorten"
                " `window_s`, or lower the load"
            )
        self._lines.write(_line(record))

    def pack(self) -> None:
        """Write all of them as `write` does. Raises OSError."""
        self._lines.seek(0)
        _pack(self._path, self._lines)
        self.close()

    def close(self) -> None:
        """Drop what was not packed."""
        with contextlib.suppress(OSError):  # a full disk takes not even the last ones
            self._lines.close()


def most_chunks(asked_tokens: int) -> int:
    """Return the most chunks with tokens that an answer of so many tokens may come in."""
    return 2 * asked_tokens + 16


def values_at_most(text: bytes) -> int:
    """Count the values that JSON can hold by its commas and brackets, without parsing it."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def read(path: Path) -> Iterator[RequestRecord]:
    """Read the records back; raises ValueError, which names the line that cannot be read.

    It is raised as well, before they fill the memory, for more than any trial's records hold.
    """
    number = chunks = 0
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > MOST_VALUES and not _is_parsed(line):
                    raise _ImpossibleError("it is too long")
                fields = orjson.loads(line)
                chunks += len(fields["chunks"])
                if chunks > MOST_CHUNKS:
                    raise _ImpossibleError(f"more than {MOST_CHUNKS} chunks so far")
                if not set(map(type, chain.from_iterable(fields["chunks"]))) <= {int, float}:
                    raise _ImpossibleError("a chunk is no time with a whole number of tokens")
                record = RequestRecord.of(fields)
                require_possible(record)
                yield record
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        why = f" ({error})" if isinstance(error, _ImpossibleError) else ""
        raise ValueError(f"{path}, line {number}: not a request record{why}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged after line {number} ({error})") from error


def read_all(path: Path) -> list[RequestRecord]:
    """Read all records back as `read` does.

    The garbage collector waits: it would look through them again and again, and no record refers to
    another.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return list(read(path))
    finally:
        if collects:
            gc.enable()


def _is_parsed(line: bytes) -> bool:
    return len(line) <= MOST_LINE_BYTES and values_at_most(line) <= MOST_VALUES


class _ImpossibleError(ValueError):
    """A value is none that a request can have."""


def require_possible(record: RequestRecord) -> None:
    """Check the types and sizes of a record that was read. Raises ValueError."""
    times_s, tokens = record.chunks.times_s, record.chunks.tokens
    given_s = (
        record.sent_s,
        record.scheduled_s,
        record.end_s,
        record.first_byte_s,
        record.first_answer_s,
    )
    times = [t for t in given_s if t is not None]
    if times_s:
        times += min(times_s), max(times_s)
    if not set(map(type, times)) <= {float, int} or not 0 <= min(times) <= max(times) <= LONGEST_S:
        raise _ImpossibleError(f"a time is no number of seconds from 0 to {LONGEST_S:.0f}")
    given = (record.prompt_tokens, record.output_tokens, record.choice, record.alike_tokens)
    sizes = [sum(tokens), record.index, record.asked_tokens]
    sizes += [n for n in given if n is not None]
    if not set(map(type, sizes)) == {int} or min(*sizes, *tokens) < 0:
        raise _ImpossibleError("a number of tokens is no whole number")
    if max(sizes) > MOST_TOKENS:
        raise _ImpossibleError(f"it has more than {MOST_TOKENS} tokens")
    if len(tokens) > most_chunks(record.asked_tokens):
        raise _ImpossibleError(f"it has {len(tokens)} chunks for {record.asked_tokens} tokens")
    if not all(text is None or isinstance(text, str) for text in (record.error, record.text)):
        raise _ImpossibleError("an error or an answer is no text")
