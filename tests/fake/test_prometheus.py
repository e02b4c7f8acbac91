"""The Prometheus of a run, started here: who may record into its data, and its bad days."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import requests

from dashboards import prometheus, series
from dashboards.prometheus import Prometheus, PrometheusError
from tests import queries
from tests.fake.conftest import needs_prometheus

pytestmark = needs_prometheus


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prometheus, "HOME", tmp_path / "data")
    return tmp_path / "data"


def test_two_checkouts_do_not_record_into_the_same_data(home: Path, tmp_path: Path) -> None:
    """The second goes on without, and what the first has scraped stays what it is."""
    with Prometheus(tmp_path / "one.log") as one:
        one.scrape("client", "http://127.0.0.1:1")
        scraped = (home / "client.json").read_text()
        with Prometheus(tmp_path / "two.log") as two:
            assert two.missing
            assert "another checkout" in two.missing
            two.scrape("client", "http://127.0.0.1:2")
            assert two.value("vector(1)") is None
        assert (home / "client.json").read_text() == scraped
        assert one.value("vector(1)") == 1
    with Prometheus(tmp_path / "three.log") as three:
        assert three.missing is None


def test_of_a_run_that_was_resumed_the_last_verdicts_stand(tmp_path: Path) -> None:
    """Its figures are loaded each time it ends, and a claim may come to something else."""
    run = 'lab="l",run_id="r",machine="m",treatment="a",baseline="b"'
    for ago_s, outcomes in ((7200, ("helps", "hurts")), (3600, ("inconclusive", "hurts"))):
        at = time.time() - ago_s
        prometheus.load(
            f'{series.VERDICT}{{{run},claim="{n}",outcome="{outcome}",prediction="open"}}'
            f" {at:.0f} {at:.3f}"
            for n, outcome in enumerate(outcomes)
        )
    (query,) = (
        q
        for board, panel, q in queries.expressions({"lab": "l", "run": "r", "__range": "1d"})
        if (board, panel) == ("Compare", "Verdicts") and series.VERDICT in q
    )
    with Prometheus(tmp_path / "log") as there:
        answer = requests.get(f"{there.url}/api/v1/query", {"query": query}, timeout=10).json()
    told = [row["metric"] for row in answer["data"]["result"]]
    found = sorted((verdict["claim"], verdict["outcome"]) for verdict in told)
    assert found == [("0", "inconclusive"), ("1", "hurts")]


def test_what_a_load_that_was_killed_left_is_removed(home: Path) -> None:
    left = home / "load-killed"
    left.mkdir(parents=True)
    prometheus.load(["x 1 1764000000"])
    assert not left.exists()
    assert list((home / "data").iterdir())


def test_a_full_disk_costs_what_is_recorded_and_no_run(home: Path, tmp_path: Path) -> None:
    """As its log says while it answers with what it still had."""
    log = tmp_path / "log"
    with Prometheus(log) as there:
        assert there.settle("vector(1)", 2, timeout_s=0) == 1
        with log.open("a") as file:
            file.write('msg="Scrape commit failed" err="write to WAL: no space left on device"\n')
        assert there.settle("vector(1)", 2, timeout_s=0) is None
        assert "no space" in (there.missing or "")


def test_a_folder_that_cannot_be_used_costs_no_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Prometheus(tmp_path / "log") as there:
        shutil.rmtree(home)
        home.touch()  # whatever is written there fails from now on
        there.scrape("client", "http://127.0.0.1:1")
        assert f"{home}: Not a directory" in (there.missing or "")
    assert Prometheus(tmp_path / "log").missing is not None
    with pytest.raises(PrometheusError, match="cannot use"):
        prometheus.load(["x 1 1764000000"])
