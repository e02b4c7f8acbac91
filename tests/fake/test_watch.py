"""A Prometheus that stays up between labs, and finished runs loaded into it."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from dashboards import series
from labs.harness.analysis.measure import Trial
from labs.harness.storage.results import RunFolder
from loadtests import exporter
from loadtests.records import RequestRecord
from serving import metrics
from serving.processes.ports import free_port
from tests.browser import Page, browser, find
from tests.fake.conftest import (
    LABS_WITH_FAKE_MODELS,
    Command,
    Reader,
    needs_prometheus,
    reading,
    the_program,
)

pytestmark = needs_prometheus

BRIEF = (
    "warmup_s=0.1 window_s=0.5 repeats=2 most_repeats=0"
    ' workloads.exponential.loads=["concurrent:4","waves:4"]'
    ' workloads.fixed.loads=["concurrent:4"] requests=64'
    " claims.static.treatment.load=concurrent:4 claims.static.baseline.load=waves:4"
)


def trials_of(folder: RunFolder) -> list[Trial]:
    trials = folder.trials(folder.run().points(), folder.run().rebuilt_lab())
    return [trial for _, _, trial in trials if trial]


def records_of(folder: RunFolder) -> list[RequestRecord]:
    return [record for trial in trials_of(folder) for record in trial.records]


@dataclass(frozen=True)
class Watched:
    """Someone who watches at this address."""

    reader: Reader
    port: int

    def ask(self, expression: str) -> list[dict[str, object]]:
        """An instant query, over the last hour."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query"
        answer = requests.get(url, {"query": expression.replace("$1", "[1h]")}, timeout=10)
        found: list[dict[str, object]] = answer.json()["data"]["result"]
        return found

    def value(self, expression: str) -> float:
        (only,) = self.ask(expression)
        return float(only["value"][1])  # type: ignore[index]

    def imports(self) -> str:
        command = self.reader.types("import")
        assert command.wait() == 0, command.said
        return command.said


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with reading(tmp_path_factory.mktemp("watched") / "reader") as someone:
        port = free_port()
        command = someone.types("watch", PORT=str(port))
        try:
            assert command.wait() == 0, command.said
            yield Watched(someone, port)
        finally:
            someone.types("stop").wait()


@pytest.fixture(scope="module")
def cut(watched: Watched) -> Command:
    """A run whose own Prometheus was killed in the middle of it, before anybody watched."""
    watched.reader.types("stop").wait()
    command = watched.reader.types(
        "run", "continuous-batching", QUICK="1", SET=BRIEF, program=LABS_WITH_FAKE_MODELS
    )
    command.until(r"repeat 1 of .* tok/s \(")
    the_program("prometheus", command.family()).kill()
    assert command.wait() == 0, command.said
    again = watched.reader.types("watch", PORT=str(watched.port))
    assert again.wait() == 0, again.said
    return command


def test_the_page_and_its_parts_are_handed_out(watched: Watched) -> None:
    home = f"http://127.0.0.1:{watched.port}/user/"
    parts = ["", "boards.json", "reports/"]
    for part in parts:  # which grows: a module names others
        answer = requests.get(home + part, timeout=10)
        assert answer.ok, part
        if part in ("", "page.js", "charts.js", "moments.js"):
            named = re.findall(r'(?:src=|href=|from )"(?:\./)?([a-z.]+)"', answer.text)
            parts += [name for name in named if name not in parts]
    assert {"page.css", "plotly.min.js", "page.js", "charts.js", "frames.js"} <= {*parts}


def test_watching_twice_names_the_one_that_is_up(watched: Watched) -> None:
    command = watched.reader.types("watch", PORT=str(free_port()))
    assert command.wait() == 0
    assert f":{watched.port}/user/" in command.said


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with reading(tmp_path / "reader") as someone, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = someone.types("watch", PORT=str(taken.getsockname()[1]))
        assert command.wait() == 1
        assert "another with PORT=" in command.said


def test_a_run_that_lost_its_prometheus_is_made_whole(watched: Watched, cut: Command) -> None:
    """What was scraped and what is loaded add up to the records; no request counts twice."""
    folder = cut.folder
    assert "Prometheus ended" in (folder.path / "report.md").read_text()
    found = re.search(r"(\d+) trials and the figures", watched.imports())
    played = len(trials_of(folder))
    assert found
    assert 0 < int(found[1]) <= played
    labels = f"outcome='ok',run_id='{folder.path.name}'"
    counted = watched.value(f"sum(max_over_time({exporter.REQUESTS}_total{{{labels}}}$1))")
    known = len(records_of(folder))
    # of the trial in which it died, what it had not heard of yet is on neither side
    assert known * (1 - 2 / played) <= counted <= known


def test_loading_twice_changes_nothing(watched: Watched, cut: Command) -> None:
    watched.imports()
    samples = f"sum(count_over_time({exporter.OUTPUT_TOKENS}_total$1))"
    before = watched.value(samples)
    assert "already loaded" in watched.imports()
    assert watched.value(samples) == before > 0


def test_a_damaged_run_is_named_and_left_out(
    watched: Watched, cut: Command, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    shutil.copytree(watched.reader.results, results)
    path = next(results.rglob("requests.jsonl.xz"))
    path.write_bytes(path.read_bytes()[:-20])
    command = watched.reader.types("import", RESULTS=str(results))
    assert command.wait() == 1
    name = cut.folder.path.name
    assert re.search(rf"{name}: left out: .*requests.jsonl.xz: damaged", command.said)
    assert "not be read: 1;" in command.said


def test_the_figures_are_those_of_the_report(watched: Watched, cut: Command) -> None:
    watched.imports()
    summary = cut.folder.summary()
    for judgement in summary.judgements:
        assert judgement.effect
        labels = f"claim='{judgement.claim}',treatment='{judgement.treatment}'"
        known = watched.value(f"last_over_time({series.EFFECT}{{{labels}}}$1)")
        assert known == pytest.approx(judgement.effect.ratio.value)
        (verdict,) = watched.ask(f"last_over_time({series.VERDICT}{{{labels}}}$1)")
        assert verdict["metric"]["outcome"] == judgement.outcome  # type: ignore[index]


@pytest.mark.skipif(find() is None, reason="no chromium: `apt-get install chromium` brings it")
def test_the_page_draws_a_run_and_its_verdicts(
    watched: Watched, cut: Command, tmp_path: Path
) -> None:
    watched.imports()
    home, run = f"http://127.0.0.1:{watched.port}/user/", cut.folder.path.name
    with browser(tmp_path / "profile") as chromium:
        page = Page(chromium, 1280, 900)
        page.open(f"{home}?run={run}")
        page.wait("document.body.dataset.drawn")
        assert page.js("document.getElementById('choose-run').value") == run
        drawn = (
            "[...document.querySelectorAll('section')]"
            ".filter(s => s.querySelector('.main-svg')).map(s => s.children[0].textContent)"
        )
        assert {"TTFT", "TPOT", "ITL", "E2E", "Output tokens"} <= set(page.js(drawn))
        assert "GPU power" not in page.js(drawn)
        hidden = page.js(
            "[...document.querySelectorAll('#panels section[hidden] h3')].map(h => h.textContent)"
        )
        assert "GPU power" in hidden
        assert "TTFT" not in hidden
        told_so = page.js("document.getElementById('said').textContent")
        assert "GPU power (needs a GPU)" in told_so
        assert all(title in told_so for title in hidden)
        known = "document.querySelector('.js-plotly-plot').data[0].text"
        page.wait(f"{known}.length > 0")
        told = set(page.js(known))
        points = {f"{p.workload.name} {p.load.name}" for p in cut.folder.run().points()}
        assert {text.removesuffix(", warm-up") for text in told} <= points
        colours = "document.querySelector('.js-plotly-plot').layout.shapes.map(s => s.fillcolor)"
        assert len(set(page.js(colours)) - {None}) == 2  # load points, and their warm-up
        page.choose("choose-board", "lab-compare")
        titles = [judgement.title for judgement in cut.folder.summary().judgements]
        page.wait(f"document.getElementById('panels').textContent.includes({titles[0]!r})")
        said = page.js("document.getElementById('panels').textContent")
        assert all(title in said for title in titles)
        page.wait("!!document.querySelector('td a')")
        report = page.js("document.querySelector('td a').href")
        assert report == f"{home}reports/{'/'.join(cut.folder.path.parts[-3:])}/"
        assert 'href="report.html"' in requests.get(report, timeout=10).text
        assert page.errors == []


def test_a_lab_records_where_it_is_watched(watched: Watched, cut: Command, tmp_path: Path) -> None:
    """Every request that ended well is there; the one that watches outlives the run."""
    results = tmp_path / "results"
    (here,) = watched.reader.results.glob("*/machine.json")
    (results / here.parent.name).mkdir(parents=True)
    (results / here.parent.name / "machine.json").write_bytes(here.read_bytes())
    command = watched.reader.types(
        "run", "continuous-batching", QUICK="1", SET=BRIEF, RESULTS=str(results),
        program=LABS_WITH_FAKE_MODELS,
    )  # fmt: skip
    assert command.wait() == 0, command.said
    assert f":{watched.port}/" in command.said
    (found,) = results.glob("*/*/*/run.json")
    folder = RunFolder(found.parent)
    good = sum(r.ok for r in records_of(folder))
    labels = f"outcome='ok',run_id='{folder.path.name}'"
    assert watched.value(f"sum(max_over_time({exporter.REQUESTS}_total{{{labels}}}$1))") == good
    kept = [
        one for trial in trials_of(folder) for one in folder.series(trial.point.key, trial.repeat)
    ]
    assert {metrics.RUNNING, metrics.KV_USAGE, metrics.REQUESTS} <= {one.name for one in kept}
    assert all(one.times_s for one in kept)
    session = folder.session()
    assert session
    assert all(a.prometheus == a.records for a in session.agreement)
    samples = f"sum(count_over_time({exporter.LOAD_POINT}{{run_id='{folder.path.name}'}}$1))"
    scraped = watched.value(samples)
    watched.reader.types("stop").wait()
    again = watched.reader.types("watch", PORT=str(watched.port))
    assert again.wait() == 0, again.said
    # the figures were loaded after the last scrape, which is not to cost what came before it
    assert watched.value(samples) == scraped
    assert watched.ask(f"last_over_time({series.RUN_INFO}{{run_id='{folder.path.name}'}}$1)")
