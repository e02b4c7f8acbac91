"""Load from other machines: who may join a run, what they send, and what becomes of the run."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from labs.harness.filing.results import RunFolder
from labs.harness.judging.measure import Trial
from loadtests import generator, load_workers
from loadtests.arrivals import Poisson, send_times
from loadtests.load_workers import LoadWorkers
from loadtests.plan import LEAST_COUNTED
from loadtests.records import RequestRecord
from serving import metrics
from serving.processes.ports import free_port
from serving.processes.process import Process
from serving.weights.models import ROOT
from tests.fake.conftest import Command, Reader, fake_engine, reading

BATCHING = "continuous-batching"
SHORT = "warmup_s=.2 window_s=1 requests=512 repeats=1 most_repeats=0"
EVERY_ARRIVAL = (
    'workloads.exponential.loads=["concurrent:4","waves:4"]'
    ' workloads.fixed.loads=["concurrent:4"]'
    " claims.static.treatment.load=concurrent:4 claims.static.baseline.load=waves:4"
)
USERS_ALONE = 'workloads=["fixed"] workloads.fixed.loads=["concurrent:4","concurrent:2"]'
ELSEWHERE = """
import os, runpy, sys
os.chdir(sys.argv.pop(1))
sys.argv[0] = "locust"
runpy.run_module("locust", run_name="__main__")
"""
KEY = "sixteen-letters!"
LAW = ("--step-s", ".01", "--step-per-seq-s", ".0001", "--prefill-per-token-s", "0")
RATE_PER_S, SPEED, EVERY_S = 20, 2, 0.2
TRACE = "".join(f"{0.07 * i:.2f},32,{4 + i % 5}\n" for i in range(60))  # the last after 4.13 s
SCHEDULED = (
    f'workloads.exponential.loads=["poisson:{RATE_PER_S}","replay:{SPEED}"]'
    f' workloads.fixed.loads=["contended:5/{EVERY_S}"]'
    ' workloads.fixed.intruder={"prompt_tokens":64} workloads.exponential.trace='
)


@dataclass(frozen=True)
class Shared:
    """A run that load workers joined: what each said, and what the engine counted."""

    run: Command
    worker: Command
    stranger: Command
    answered: int

    @property
    def folder(self) -> RunFolder:
        return self.run.folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    home = tmp_path_factory.mktemp("shared")
    with reading(home / "reader") as reader:
        with fake_engine(log := home / "engine.jsonl", *LAW) as url:
            run = reader.types(
                "run",
                BATCHING,
                ENDPOINT=url,
                LOAD_WORKERS="1",
                KEY=KEY,
                QUICK="1",
                SET=f"{SHORT} {EVERY_ARRIVAL}",
            )
            master = run.until(r"MASTER=(\S+)")[1]
            stranger = reader.types("load-worker", MASTER=master, KEY="another sixteen.")
            stranger.wait()
            worker = reader.types("load-worker", MASTER=master, KEY=KEY)
            worker.until("Requests sent in this trial")
            run.wait()
            worker.wait()
        yield Shared(run, worker, stranger, _lines(log))


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The same under arrivals that have a schedule, or an intruder."""
    home = tmp_path_factory.mktemp("scheduled")
    (trace := home / "trace.csv").write_text("timestamp,input_tokens,output_tokens\n" + TRACE)
    with reading(home / "reader") as reader:
        with fake_engine(log := home / "engine.jsonl", *LAW) as url:
            run = reader.types(
                "run", BATCHING, ENDPOINT=url, LOAD_WORKERS="1", KEY=KEY, QUICK="1",
                SET=f"{SHORT} {SCHEDULED}{trace}",
            )  # fmt: skip
            master = run.until(r"MASTER=(\S+)")[1]
            worker = reader.types("load-worker", MASTER=master, KEY=KEY)
            run.wait()
            worker.wait()
        yield Shared(run, worker, worker, _lines(log))


def _lines(log: Path) -> int:
    return len(log.read_text().splitlines())


def _sent(command: Command) -> list[int]:
    return [int(n) for n in re.findall(r"Requests sent in this trial: (\d+)", command.said)]


def test_a_load_worker_sends_its_share_and_ends_with_the_run(shared: Shared) -> None:
    assert shared.run.process.returncode == 0, shared.run.said
    assert shared.folder.complete
    assert shared.folder.run().load_workers == 1
    assert "on other machines: 1" in (shared.folder.path / "report.md").read_text()
    records = _records(shared.folder)
    assert 1 + len(records) == shared.answered  # the first one asked whether it streams
    assert shared.worker.process.returncode == 0, shared.worker.said
    trials = _trials(shared.folder)
    by_worker = _sent(shared.worker)
    assert len(by_worker) == len(trials)
    assert 0 < sum(by_worker) < len(records)
    assert not any(t.summary.lost_share for t in trials)


def test_nobody_joins_without_the_key(shared: Shared) -> None:
    assert shared.stranger.process.returncode == 1
    assert "KEY" in shared.stranger.said
    assert "Joined" not in shared.stranger.said


def test_no_key_is_kept(shared: Shared) -> None:
    kept = [p for p in shared.folder.path.rglob("*") if p.is_file()]
    assert kept
    assert not [p for p in kept if KEY.encode() in p.read_bytes()]


def _with_sent(scheduled: Shared) -> list[tuple[Trial, int]]:
    """The three trials as they were played, with what the load worker sent in each."""
    played = sorted(_trials(scheduled.folder), key=lambda trial: trial.summary.started_unix_s)
    assert len(played) == 3
    return list(zip(played, _sent(scheduled.worker), strict=True))


def test_a_schedule_is_sent_once_by_all_load_processes_together(scheduled: Shared) -> None:
    assert scheduled.run.process.returncode == 0, scheduled.run.said
    lab = scheduled.folder.run().rebuilt_lab()
    duration_s = lab.warmup_s + lab.window_s
    drawn = send_times(Poisson(rate_per_s=RATE_PER_S), duration_s, lab.draw_seed(1), None)
    replayed = [float(line.split(",")[0]) / SPEED for line in TRACE.splitlines()]
    schedules = {"poisson": drawn, "replay": [at_s for at_s in replayed if at_s < duration_s]}
    for trial, by_worker in _with_sent(scheduled):
        if trial.point.load.kind in schedules:
            schedule = schedules.pop(trial.point.load.kind)
            assert schedule
            assert sorted(r.scheduled_s or 0 for r in trial.records) == pytest.approx(schedule)
            assert sorted(r.index for r in trial.records) == [*range(len(schedule))]
            assert trial.summary.planned == trial.summary.sent == len(schedule)
            assert by_worker in (len(schedule) // 2, (len(schedule) + 1) // 2)
    assert not schedules


def test_one_load_process_sends_what_an_intruder_does(scheduled: Shared) -> None:
    (trial,) = (t for t in _trials(scheduled.folder) if t.point.load.kind == "contended")
    assert len({r.index for r in trial.records}) == len(trial.records)
    intrusions = sorted(
        r.sent_s for r in trial.records if trial.point.workload.is_intruder(r.index)
    )
    assert len(intrusions) >= LEAST_COUNTED
    for number, at_s in enumerate(intrusions, 1):  # two would send twice as many
        assert at_s > (number - 0.5) * EVERY_S


def test_the_engine_counts_what_both_load_processes_sent(scheduled: Shared) -> None:
    for trial, by_worker in _with_sent(scheduled):
        assert 0 < by_worker < len(trial.records)
        assert trial.engine
        assert trial.engine.values[metrics.REQUESTS] == len(trial.records)
        assert all(record.ok for record in trial.records)
        assert trial.summary.lost_share == 0
    # the first one asked whether it streams
    assert 1 + len(_records(scheduled.folder)) == scheduled.answered


def test_one_that_leaves_takes_its_share_along_and_one_that_comes_late_has_none(
    reader: Reader, tmp_path: Path
) -> None:
    with fake_engine(log := tmp_path / "engine.jsonl", "--step-s", ".01") as url:
        run = reader.types(
            "run", BATCHING, ENDPOINT=url, LOAD_WORKERS="1", KEY=KEY, QUICK="1",
            SET=f"{SHORT} {USERS_ALONE} repeats=2 window_s=2",
        )  # fmt: skip
        master = run.until(r"MASTER=(\S+)")[1]
        worker = reader.types("load-worker", MASTER=master, KEY=KEY)
        worker.until("Requests sent in this trial")
        late = reader.types("load-worker", MASTER=master, KEY=KEY)
        answered = _lines(log)
        while _lines(log) < answered + 8:  # the next trial is under way
            time.sleep(0.02)
        worker.process.send_signal(signal.SIGINT)
        assert worker.wait() == 130
        assert run.wait() == 0, run.said
        late.wait()
    assert not _sent(late)
    lost = [t.summary.lost_share for t in _trials(run.folder)]
    assert lost.count(0.5) == 1
    assert set(lost) == {0, 0.5}
    assert "lost" in (run.folder.path / "report.md").read_text()


def test_other_code_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "loadtests", tmp_path / "loadtests")
    (tmp_path / "loadtests" / "__init__.py").write_text('"""Another."""\n')
    elsewhere = LoadWorkers(1, load_workers.LOOPBACK, free_port(), KEY)
    env = {load_workers.KEY: KEY}
    argv = generator.argv(2, free_port(), free_port(), 1, elsewhere)
    worker = generator.worker_argv(elsewhere.host, elsewhere.port)
    locustfile = str(tmp_path / "loadtests" / "locustfile.py")
    options = [locustfile if part == str(generator.LOCUSTFILE) else part for part in worker[3:]]
    there = [sys.executable, "-c", ELSEWHERE, str(tmp_path), *options]
    with (
        Process("locust", argv, log=tmp_path / "locust.log", env=env, talk=True) as locust,
        Process("worker", there, log=tmp_path / "worker.log", env=env),
        pytest.raises(generator.GeneratorError, match="same commit"),
    ):
        generator.Generator(locust)
    assert "same commit" in (tmp_path / "worker.log").read_text()


def _trials(folder: RunFolder) -> list[Trial]:
    trials = folder.trials(folder.run().points(), folder.run().rebuilt_lab())
    return [trial for _, _, trial in trials if trial]


def _records(folder: RunFolder) -> list[RequestRecord]:
    return [record for trial in _trials(folder) for record in trial.records]
