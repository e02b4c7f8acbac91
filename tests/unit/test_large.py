"""A run may be larger than memory, and its pictures have to stay small enough to open."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs.harness.analysis.measure import Trial
from labs.harness.derived.summarize import summarise
from labs.harness.reports import chart_data
from labs.harness.reports.drawing import MOST_DRAWN, thinned
from labs.harness.runner import backfill
from labs.harness.storage import export, results
from labs.harness.storage.checks import problems
from labs.harness.storage.results import RunFolder
from loadtests import records
from tests.unit.builders import make_record, write_run


def page_data(folder: RunFolder) -> None:
    chart_data.data(folder, folder.run(), folder.summary())


def export_csv(folder: RunFolder) -> None:
    export.export(folder, folder.path / "tables")


@pytest.mark.parametrize(
    ("read", "beside"),
    [(summarise, 0), (page_data, 0), (problems, 0), (backfill._trials, 0), (export_csv, 1)],
)
def test_trials_are_read_one_by_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[RunFolder], Any],
    beside: int,
) -> None:
    """However many there are, no more of them than `beside` is kept while another is read."""
    folder, made, kept = write_run(tmp_path), list[weakref.ref[Trial]](), list[int]()

    def noted(*arguments: Any) -> Trial:
        kept.append(sum(trial() is not None for trial in made))
        trial = Trial(*arguments)
        made.append(weakref.ref(trial))
        return trial

    monkeypatch.setattr(results, "Trial", noted)
    read(folder)
    assert len(kept) > 4
    assert max(kept) <= beside


def test_a_chunk_takes_few_bytes(tmp_path: Path) -> None:
    """As a tuple in a list it takes over 80, of which a trial may have millions."""
    n = 100_000
    records.write(tmp_path / "r.gz", [make_record([(i / n, 1) for i in range(n)], sent_s=0.0)])
    tracemalloc.start()
    (record,) = records.read(tmp_path / "r.gz")
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(record.chunks) == n
    assert kept_bytes < 24 * n


def test_a_long_line_is_thinned_to_what_can_be_seen_and_keeps_its_extremes() -> None:
    x = np.arange(1_000_000)
    y = np.sin(x / 1000)
    y[[123_456, 987_654]] = 7, -7
    drawn_x, drawn_y = thinned(x, y)
    assert len(drawn_x) <= MOST_DRAWN
    assert (drawn_x[0], drawn_x[-1]) == (0, 999_999)
    assert {123_456, 987_654} <= set(drawn_x)
    assert np.array_equal(drawn_y, y[drawn_x])
    assert np.all(np.diff(drawn_x) > 0)
