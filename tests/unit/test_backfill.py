"""Which runs an import adds, with a Prometheus that has seen nothing; the rest is in tests/fake."""

from __future__ import annotations

import errno
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from dashboards import live, prometheus, series
from labs.harness.analysis.text import claim_outcome
from labs.harness.analysis.verdicts import ForecastResult, Interval, prediction_outcome
from labs.harness.runner import backfill
from labs.harness.runner import run as running
from labs.harness.spec.lab import LabError, Prediction
from labs.harness.storage.recorded import Session
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import exporter, records
from tests.unit.builders import make_record, make_workload, write_run
from tests.unit.test_other_engines import Told


class Empty:
    """A Prometheus without a sample, which answers so many questions."""

    missing: str | None = None
    answers = 1_000_000

    def __init__(self, log: Path) -> None:
        del log

    def known(self, expression: str, at_unix_s: float | None = None) -> None:
        del expression, at_unix_s
        self.answers -= 1
        if self.answers < 0:
            raise requests.ReadTimeout("read timed out")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line that is handed to Prometheus."""
    lines: list[str] = []

    def load(samples: Iterable[str]) -> None:
        lines.extend(samples)

    monkeypatch.setattr(backfill, "Prometheus", Empty)
    monkeypatch.setattr(prometheus, "watching", lambda: None)
    monkeypatch.setattr(prometheus, "load", load)
    return lines


def brief_run(home: Path, **fields: Any) -> RunFolder:
    """A run of one trial a variant, as each second of each is hundreds of lines."""
    return write_run(home, workloads=(make_workload(),), repeats=1, **fields)


def imported(*folders: RunFolder) -> list[str]:
    said: list[str] = []
    backfill.load(folders, lambda folder, what: said.append(f"{folder.path.name}: {what}"))
    return said


def test_of_an_interrupted_run_its_finished_trials_are_added(
    tmp_path: Path, loaded: list[str]
) -> None:
    """And the runs beside it whole, also where one has barely begun."""
    whole, cut, begun = (brief_run(tmp_path / name) for name in ("whole", "cut", "begun"))
    for folder in (cut, begun):
        (folder.path / "summary.json").unlink()
        (folder.path / "COMPLETE").unlink()
    shutil.rmtree(begun.path / "trials")
    trials = len(list(whole.path.rglob("trial.json")))
    first, second, third = imported(begun, cut, whole)
    assert first.endswith(" has finished")
    assert second.endswith(f": {trials} trials")
    assert re.search(rf": {trials} trials and .* report$", third)
    assert sum(line.startswith(series.RUN_INFO) for line in loaded) == 1
    assert sum(line.startswith(exporter.LOAD_POINT) for line in loaded) > 0


def test_the_warm_up_of_every_trial_is_told(tmp_path: Path, loaded: list[str]) -> None:
    """Its window begins at 10 s, so the scrapes of ten seconds lie before it."""
    folder = brief_run(tmp_path)
    imported(folder)
    told = [line for line in loaded if line.startswith(exporter.WARM_UP)]
    trials = len(list(folder.path.rglob("trial.json")))
    assert sum(line.split()[-2] == "1.0" for line in told) == 10 * trials
    assert len(told) > 10 * trials


@pytest.mark.parametrize("flags", [{}, {"max-num-queued-reqs": 4}])
def test_a_refusal_counts_as_it_does_in_the_report(
    flags: dict[str, int], tmp_path: Path, loaded: list[str]
) -> None:
    folder = brief_run(tmp_path, flags=flags)
    path = next(folder.path.rglob("requests.jsonl.gz"))
    refused = make_record([], error="HTTP 503: busy", end_s=11.0)
    records.write(path, [*records.read(path), refused])
    imported(folder)
    kept = {
        outcome: max(
            float(line.split()[-2])
            for line in loaded
            if line.startswith(f"{exporter.REQUESTS}_total") and f'outcome="{outcome}"' in line
        )
        for outcome in ("error", "turned away")
    }
    assert kept == ({"error": 0, "turned away": 1} if flags else {"error": 1, "turned away": 0})


def test_figures_of_a_run_whose_trials_all_failed_are_none(
    tmp_path: Path, loaded: list[str]
) -> None:
    folder = write_run(tmp_path)
    shutil.rmtree(folder.path / "trials")
    backfill.load_figures(folder)
    assert loaded == []


def test_a_run_whose_page_finds_no_room_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = brief_run(tmp_path), Told()
    (folder.path / "COMPLETE").unlink()

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(live, "publish", full)
    session = Session(
        engine_start_s=1, load_s=1, wall_s=1, resident=True, agreement=[], prometheus="none"
    )
    running._finish(folder, session, told, reports=False)
    assert folder.complete
    assert ["No space left" in message for message in told.messages] == [True]


def test_what_became_of_predictions_is_told_in_the_words_of_the_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    ceiling = Prediction(value=200, kind="ceiling", formula="")
    measured = Interval(value=100, low=90, high=110, n=3)
    forecast = ForecastResult(
        metric="output_tokens_per_s", point=folder.run().points()[0].key, measured=measured,
        prediction=ceiling, outcome=prediction_outcome(ceiling, measured),
    )  # fmt: skip
    summary = folder.summary().model_copy(update={"forecasts": [forecast]})
    write_json(folder.path / "summary.json", summary)
    figures = "\n".join(backfill._figures(folder, 1.0))
    forecasts, verdicts = (
        Counter(re.findall(rf'^{name}{{.*prediction="(.*?)"', figures, re.MULTILINE))
        for name in (series.FORECAST_OUTCOME, series.VERDICT)
    )
    assert forecasts == {"not broken (50% of it)": 1}
    assert verdicts == Counter(map(claim_outcome, summary.judgements))


def test_nothing_is_added_where_prometheus_does_not_answer(
    tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did not answer is not to be taken for what it does not have."""
    monkeypatch.setattr(Empty, "answers", 1)
    with pytest.raises(LabError, match="read timed out"):
        imported(write_run(tmp_path))
    assert loaded == []
