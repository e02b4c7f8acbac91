"""Reads traces of real traffic: when each request came, and the lengths of prompt and output.

They are read as they are published: CSV with the columns `timestamp,input_tokens,output_tokens`
(seconds), the Azure LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`, dates), and
Mooncake's JSON lines (`timestamp` in milliseconds, `input_length`, `output_length`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
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


def read_trace(path: Path, most_rows: int = MOST_ROWS) -> tuple[TraceRow, ...]:
    """Read the first `most_rows` requests of a trace, in order of time.

    No more than twice as many are held at any moment, however long the file is. Raises ValueError,
    which names the request and the reason.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"the trace {path} cannot be read: it is not a regular file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(
                f"the trace {path} has more than {MOST_BYTES / 2**20:.0f} MiB: give its beginning"
            )
        with path.open(newline="") as file:
            lines = _lines(path, file)
            named = map(json.loads, lines) if path.suffix == ".jsonl" else csv.DictReader(lines)
            rows = _first(_rows(path, named), most_rows)
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
    kept: list[TraceRow] = []
    for row in rows:
        kept.append(row)
        if len(kept) == 2 * most_rows:
            kept.sort(key=itemgetter(0))
            del kept[most_rows:]
    kept.sort(key=itemgetter(0))
    return kept[:most_rows]


def _rows(path: Path, lines: Iterable[Mapping[str, Any]]) -> Iterable[TraceRow]:
    kinds: set[str] = set()
    same: dict[int, int] = {}  # a length that comes again is kept once
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict):
            raise ValueError(f"{path}, request {number}: it is not an object with named fields")
        fields = {str(key).strip().lower(): value for key, value in line.items()}
        names = next((c for c in COLUMNS if set(c) <= fields.keys()), None)
        if names is None:
            readable = "; ".join(", ".join(columns) for columns in COLUMNS)
            columns = ", ".join(map(str, line))
            raise ValueError(f"{path} has the columns {columns}; known are {readable}")
        at, prompt, output = (fields[name] for name in names)
        try:
            at_s, kind = _seconds(at, "input_length" in names)
            prompt, output = int(prompt), int(output)
            row = (at_s, same.setdefault(prompt, prompt), same.setdefault(output, output))
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, request {number}: {error}") from error
        kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(f"{path}, request {number}: its time is not of the others' kind")
        if max(row[1:]) > MOST_TOKENS:
            raise ValueError(f"{path}, request {number}: more than {MOST_TOKENS} tokens")
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
