"""What of an engine's own series is kept with a trial, and that an import puts it back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from labs.harness.runner import backfill
from labs.harness.runner.engine_series import keep
from labs.harness.storage import engine_series
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip
from serving import metrics
from tests.unit.test_backfill import brief_run

Samples = list[tuple[dict[str, str], list[tuple[float, float]]]]


class Scraped:
    """A Prometheus that has these series of whatever it is asked about."""

    missing: str | None = None

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked: list[str] = []

    def samples(self, selector: str, from_unix_s: float, to_unix_s: float) -> Samples:
        del to_unix_s
        self.asked.append(selector)
        hidden = {"instance": "127.0.0.1:1", "job": "engine", "model_name": "/root/models/a"}
        return [
            (
                {"__name__": name, "engine": "0", **hidden},
                [(from_unix_s + 0.25, 1.0), (from_unix_s + 1.25, math.nan),
                 (from_unix_s + 2.25, 0.5)],
            )
            for name in self.names
        ]  # fmt: skip


def kept(folder: RunFolder, there: Any) -> list[Path]:
    run = folder.run()
    keep(folder, run.points(), run.rebuilt_lab(), there)
    return sorted(folder.path.rglob(engine_series.FILE))


def test_each_trial_keeps_what_was_scraped_of_its_variant_and_no_path(folder: RunFolder) -> None:
    there = Scraped(metrics.RUNNING, metrics.KV_USAGE)
    written = kept(folder, there)
    assert len(written) == len(list(folder.path.rglob("trial.json"))) == len(there.asked)
    for path in written:
        running, usage = engine_series.read(path.parent)
        assert (running.name, usage.name) == (metrics.RUNNING, metrics.KV_USAGE)
        assert usage.labels == {"engine": "0"}
        assert (usage.times_s, usage.values) == ([0.25, 2.25], [1.0, 0.5])  # what is no number goes
    for variant in ("on", "off"):
        asked = [one for one in there.asked if f'variant="{variant}"' in one]
        assert len(asked) == len(written) / 2
    assert kept(folder, there) == written
    assert len(there.asked) == len(written)  # it asks for no trial that has its own


def test_without_prometheus_nothing_is_kept(folder: RunFolder) -> None:
    without = Scraped(metrics.RUNNING)
    without.missing = "Prometheus is not installed"
    assert kept(folder, Scraped()) == kept(folder, without) == []
    assert engine_series.read(folder.path) == []


def test_an_import_puts_them_back_at_their_times(tmp_path: Path) -> None:
    folder = brief_run(tmp_path)
    kept(folder, Scraped(metrics.KV_USAGE))
    trials = backfill._trials(folder)
    since = {trial.name: 0.0 for trial in trials}
    told = [
        line
        for line in backfill._all(folder, trials, since, False)
        if line.startswith(metrics.KV_USAGE)
    ]
    assert len(told) == 2 * len(trials)
    first = trials[0]
    expected = (
        f'{metrics.KV_USAGE}{{lab="tiny",run_id="{folder.path.name}",'
        f'variant="{first.point.variant.name}",engine="0"}} 1.0'
        f" {first.summary.started_unix_s + 0.25:.3f}"
    )
    assert told[0] == expected
    late = dict.fromkeys(since, 1.0)  # what Prometheus has scraped already is not told again
    told = [
        line
        for line in backfill._all(folder, trials, late, False)
        if line.startswith(metrics.KV_USAGE)
    ]
    assert len(told) == len(trials)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "up"},
        {"labels": {"instance": "x"}},
        {"labels": {"engine": '0"} 1\nup{a="'}},
        {"times_s": [1.0]},
        {"times_s": [2.0, 1.0]},
        {"values": ["x", 1]},
    ],
)
def test_a_file_that_says_something_else_is_damaged(
    folder: RunFolder, changed: dict[str, Any]
) -> None:
    path = kept(folder, Scraped(metrics.KV_USAGE))[0]
    plain = {"name": metrics.KV_USAGE, "labels": {}, "times_s": [1.0, 2.0], "values": [1.0, 2.0]}
    write_gzip(path, [plain])
    assert len(engine_series.read(path.parent)) == 1
    write_gzip(path, [{**plain, **changed}])
    with pytest.raises(DamagedError, match=engine_series.FILE):
        engine_series.read(path.parent)


def usage(*readings: tuple[float, float], engine: str = "0") -> dict[str, Any]:
    """How full an engine's KV cache was: (seconds from the trial's start, share)."""
    return {
        "name": metrics.KV_USAGE, "labels": {"engine": engine},
        "times_s": [at for at, _ in readings], "values": [share for _, share in readings],
    }  # fmt: skip


def test_what_was_in_use_of_the_cache_is_weighed_by_time_within_the_window(tmp_path: Path) -> None:
    """From 10 s on 0.9 for 2 s, 0.1 for 4 s and 0.3 for 4 s; the 1.0 was over before."""
    write_gzip(tmp_path / engine_series.FILE, [usage((2, 1.0), (5, 0.9), (12, 0.1), (16, 0.3))])
    use = engine_series.kv_use(engine_series.read(tmp_path), (10.0, 20.0))
    assert use
    assert [use.mean, use.peak] == pytest.approx([0.34, 0.9])


@pytest.mark.parametrize(
    "kept",
    [[], [usage((30, 0.5))], [usage((5, 0.9)), usage((5, 0.1), engine="1")]],
    ids=("nothing", "after the window", "two engines"),
)
def test_nothing_is_told_of_a_cache_that_was_not_read(
    kept: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_gzip(tmp_path / engine_series.FILE, kept)
    assert engine_series.kv_use(engine_series.read(tmp_path), (10.0, 20.0)) is None


def test_an_empty_window_has_no_share() -> None:
    assert metrics.KvUse.over_time([(0.0, 0.5)], math.inf, math.inf) is None
    assert metrics.KvUse.over_time([(0.0, 0.5)], 3.0, 3.0) is None
