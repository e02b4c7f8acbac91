"""Exports a run for other tools, as CSV tables.

The tables are long: one row for each request and one for each measurement, with its variant,
workload, load and repeat.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labs.harness.analysis.measure import Trial
from labs.harness.analysis.metrics import METRICS
from labs.harness.spec.lab import Point
from labs.harness.storage.results import RunFolder
from serving import atomic

TableRow = dict[str, Any]


def export(folder: RunFolder, out: Path) -> list[Path]:
    """Write the run's tables into `out`, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    tables = {"requests": requests(folder), "measurements": measurements(folder)}
    written = []
    for name, rows in tables.items():
        path = out / f"{name}.csv"
        with atomic.file(path) as half:
            _write_csv(half, rows)
        written.append(path)
    return written


# ------------------------------------------------------------------------------------- the tables


def requests(folder: RunFolder) -> Iterator[TableRow]:
    """Yield one row per request, read trial by trial.

    Times are seconds from the start of the trial, null where a request did not get that far.
    """
    return (
        {
            **about,
            "index": r.index,
            "choice": r.choice,  # which answer, where the request asked for several by `n`
            "in_window": r.in_window,
            "ok": r.ok,
            "error": r.error,
            "asked_tokens": r.asked_tokens,
            "prompt_tokens": r.prompt_tokens,
            "output_tokens": r.output_tokens,
            "chunks": len(r.chunks),
            "scheduled_s": r.scheduled_s,
            "sent_s": r.sent_s,
            "first_token_s": r.chunks[0][0] if r.chunks else None,
            "last_token_s": r.chunks[-1][0] if r.chunks else None,
            "end_s": r.end_s,
            "send_lag_s": r.send_lag_s,
            "ttft_s": r.ttft_s,
            "tpot_s": r.tpot_s,
            "e2e_s": r.e2e_s,
        }
        for about, trial in _trials(folder)
        for r in trial.records
    )


def measurements(folder: RunFolder) -> Iterator[TableRow]:
    """Yield one row per metric of a trial; its value is null where there were too few samples."""
    summary, run = folder.summary(), folder.run()
    return (
        {
            **_about(folder, point, repeat),
            "metric": metric,
            "unit": METRICS[metric].unit,
            "better": METRICS[metric].better,
            "value": value,
        }
        for point in run.points()
        for repeat, row in summary.measurements.get(point.key, {}).items()
        for metric, value in row.items()
    )


def _trials(folder: RunFolder) -> Iterator[tuple[TableRow, Trial]]:
    run = folder.run()
    for point, result, trial in folder.trials(run.points(), run.rebuilt_lab()):
        if trial is not None:
            yield _about(folder, point, result.repeat), trial


def _about(folder: RunFolder, point: Point, repeat: int) -> TableRow:
    return {
        "machine": folder.machine_slug,
        "lab": folder.lab_name,
        "run": folder.path.name,
        "variant": point.variant.name,
        "workload": point.workload.name,
        "load": str(point.load),
        "repeat": repeat,
    }


def _write_csv(path: Path, rows: Iterator[TableRow]) -> None:
    first = list(itertools.islice(rows, 1))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first[0]) if first else [])
        writer.writeheader()
        writer.writerows(itertools.chain(first, rows))
