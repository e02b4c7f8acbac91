"""Reads traces of real traffic: when each request came, and the lengths of prompt and output.

They are read as they are published: CSV with the columns `timestamp,input_tokens,output_tokens`
(seconds), the Azure LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`, dates), and
Mooncake's JSON lines (`timestamp` in milliseconds, `input_length`, `output_length`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from loadtests.records import MOST_TOKENS

TraceRow = tuple[float, int, int]  # seconds since the first request, prompt tokens, output tokens
COLUMNS = (
    ("timestamp", "input_tokens", "output_tokens"),
    ("timestamp", "contexttokens", "generatedtokens"),
    ("timestamp", "input_length", "output_length"),
)
MOST_BYTES = 256 * 2**20
MOST_LINE = 2**18  # characters of a request: Mooncake's longest name some hundred blocks
MOST_ROWS = 4096  # of a run: its manifest holds them, and each has a prompt that is written first
MOST_PLANNED_ROWS = 1_000_000  # of a plan or a forecast, which send nothing and file nothing
TOLD_EVERY = 100_000  # requests, which take about half a second

Tell = Callable[[str], object]


def read_trace(
    path: Path, most_rows: int = MOST_ROWS, tell: Tell = lambda _: None
) -> tuple[TraceRow, ...]:
    """Read the first `most_rows` requests of a trace, in order of time.

    No more than twice as many are held at any moment, however long the file is; where these come
    in order of time, none behind them is read. `tell` is told how far it is. Raises ValueError,
    which names the request and the reason.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"the trace {path} cannot be read: it is not a regular file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(
                f"the trace {path} has more than {MOST_BYTES / 2**20:.0f} MiB: give its beginning"
            )
        with path.open(newline="", encoding="utf-8-sig") as file:  # with or without a mark of order
            lines = _lines(path, file)
            named = map(json.loads, lines) if path.suffix == ".jsonl" else csv.DictReader(lines)
            rows = _first(_rows(path, named, tell), most_rows)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise ValueError(f"the trace {path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"the trace {path} holds no requests: give one that has some")
    first_s = rows[0][0]
    for place, (at_s, prompt, output) in enumerate(rows):  # in place: there may be a million
        rows[place] = (round(at_s - first_s, 6), prompt, output)
    return tuple(rows)


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    """Read a trace line by line, each of which is a request. Raises ValueError."""
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise ValueError(f"{path}, line {number}: it has more than {MOST_LINE} characters")
        if path.suffix != ".jsonl" and line.count('"') % 2:
            raise ValueError(f"{path}, line {number}: a quotation mark is not closed in its line")
        yield line


def _first(rows: Iterable[TraceRow], most_rows: int) -> list[TraceRow]:
    """Sort rows by their time and return the first so many."""
    to_come, kept, in_order = iter(rows), list[TraceRow](), False
    while not in_order and (read := list(islice(to_come, 2 * most_rows - len(kept)))):
        by_time = sorted([*kept, *read], key=itemgetter(0))
        in_order = by_time == read
        kept = by_time[:most_rows]
    return kept


@lru_cache(maxsize=16)
def _columns(names: tuple[Any, ...]) -> tuple[bool, tuple[Any, ...]] | None:
    """Find the columns that are read: whether the times are milliseconds, and how they are named.

    None where they are not there.
    """
    named = {str(name).strip().lower(): name for name in names}
    known = next((columns for columns in COLUMNS if set(columns) <= named.keys()), None)
    return known and ("input_length" in known, tuple(named[column] for column in known))


def _rows(path: Path, lines: Iterable[Mapping[str, Any]], tell: Tell) -> Iterable[TraceRow]:
    kinds: set[str] = set()
    same: dict[int, int] = {}  # a length that comes again is kept once
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict):
            raise ValueError(f"{path}, request {number}: it is not an object with named fields")
        if (found := _columns(tuple(line))) is None:
            readable = "; ".join(", ".join(known) for known in COLUMNS)
            columns = ", ".join(map(str, line))
            raise ValueError(f"{path} has the columns {columns}; known are {readable}")
        milliseconds, names = found
        at, prompt, output = (line[name] for name in names)
        try:
            at_s, kind = _seconds(at, milliseconds)
            prompt, output = int(prompt), int(output)
            row = (at_s, same.setdefault(prompt, prompt), same.setdefault(output, output))
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, request {number}: {error}") from error
        kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(f"{path}, request {number}: its time is not of the others' kind")
        if max(row[1:]) > MOST_TOKENS:
            raise ValueError(f"{path}, request {number}: more than {MOST_TOKENS} tokens")
        if min(row[1:]) < 0:
            raise ValueError(f"{path}, request {number}: fewer than 0 tokens")
        if number % TOLD_EVERY == 0:
            tell(f"reading the trace: {number:,} requests so far")
        if row[1] > 0 and row[2] > 0:  # some traces hold requests that were refused
            yield row


def _seconds(at: Any, milliseconds: bool) -> tuple[float, str]:
    """Return a time in seconds, and what it was given as; raises ValueError."""
    try:
        at_s = float(at) / (1000 if milliseconds else 1)
    except ValueError:
        date = datetime.fromisoformat(str(at).strip())
        return date.timestamp(), "date with a zone" if date.tzinfo else "date"
    if not math.isfinite(at_s):
        raise ValueError(f"{at} is no time")
    return at_s, "number"
