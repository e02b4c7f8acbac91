"""Reads traces of real traffic: when each request came, and the lengths of prompt and output.

They are read as they are published: CSV with the columns `timestamp,input_tokens,output_tokens`
(seconds), the Azure LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`, dates), and
Mooncake's JSON lines (`timestamp` in milliseconds, `input_length`, `output_length`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

TraceRow = tuple[float, int, int]  # seconds since the first request, prompt tokens, output tokens
COLUMNS = (
    ("timestamp", "input_tokens", "output_tokens"),
    ("timestamp", "contexttokens", "generatedtokens"),
    ("timestamp", "input_length", "output_length"),
)
MOST_ROWS = 4096  # the first ones, since a run's manifest holds them


def read_trace(path: Path) -> tuple[TraceRow, ...]:
    """Read a trace in order of time; raises ValueError, which names the request and the reason."""
    try:
        with path.open(newline="") as file:
            lines = map(json.loads, file) if path.suffix == ".jsonl" else csv.DictReader(file)
            rows = list(_rows(path, lines))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the trace {path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"the trace {path} holds no requests")
    rows.sort(key=lambda row: row[0])
    first_s = rows[0][0]
    return tuple((round(at_s - first_s, 6), p, o) for at_s, p, o in rows[:MOST_ROWS])


def _rows(path: Path, lines: Iterable[Mapping[str, Any]]) -> Iterable[TraceRow]:
    for number, line in enumerate(lines, 1):
        fields = {str(key).strip().lower(): value for key, value in line.items()}
        names = next((c for c in COLUMNS if set(c) <= fields.keys()), None)
        if names is None:
            readable = "; ".join(", ".join(columns) for columns in COLUMNS)
            columns = ", ".join(map(str, line))
            raise ValueError(f"{path} has the columns {columns}; known are {readable}")
        at, prompt, output = (fields[name] for name in names)
        try:
            row = (_seconds(at, "input_length" in names), int(prompt), int(output))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, request {number}: {error}") from error
        if row[1] > 0 and row[2] > 0:  # some traces hold requests that were refused
            yield row


def _seconds(at: Any, milliseconds: bool) -> float:
    try:
        return float(at) / (1000 if milliseconds else 1)
    except ValueError:
        return datetime.fromisoformat(str(at).strip()).timestamp()
