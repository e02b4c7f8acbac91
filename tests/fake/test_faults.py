"""Bad days: each ends in a sentence that says what to do, and leaves nothing that looks complete.

Whatever ends a run, no process of it is left; what was finished can still be read.
"""

from __future__ import annotations

import fcntl
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from labs import LABS as EVERY_LAB
from labs.harness.analysis.computed import Predictions
from labs.harness.cli import cli
from labs.harness.storage import results
from labs.harness.storage.recorded import TrialResult
from labs.harness.storage.results import RunFolder
from loadtests import generator
from loadtests.records import RequestRecord
from serving.hardware import gpus
from serving.places import OWN_FOLDER
from serving.processes.ports import free_port
from serving.processes.process import Process
from tests.fake.conftest import (
    LABS_WITHOUT_PROMETHEUS,
    Command,
    Reader,
    needs_prometheus,
    reading,
    still_alive,
    the_program,
)
from tests.processes import listening_sockets, still_listening

BATCHING = "continuous-batching"
LOADS = (
    "warmup_s=0.1 requests=64"
    ' workloads.exponential.loads=["concurrent:4"] workloads.fixed.loads=["concurrent:2"]'
)
SHORT, SHORT_TRIALS = f"{LOADS} repeats=1 most_repeats=0 window_s=0.5", 2
# the first ends long before the last
LONGER, LONGER_TRIALS = f"{LOADS} repeats=2 most_repeats=0 window_s=2", 4
TRIAL_ENDED = r"repeat 1 of .* tok/s \("


def _results(folder: RunFolder) -> list[TrialResult]:
    found = (
        folder.trial_result(point, repeat)
        for point in folder.run().points()
        for repeat in range(1, folder.run().rebuilt_lab().repeats + 1)
    )
    return [result for result in found if result]


def _records(folder: RunFolder) -> list[RequestRecord]:
    trials = folder.trials(folder.run().points(), folder.run().rebuilt_lab())
    return [record for _, _, trial in trials if trial for record in trial.records]


def _one_sentence(code: int, said: str) -> str:
    """Exit code 1 and one sentence; the sentence."""
    assert code == 1, said
    assert "Traceback" not in said
    (sentence,) = (line for line in said.splitlines() if line.startswith("error:"))
    return sentence


def _plainly_refused(command: Command, *words: str) -> None:
    """Exit code 1 and one sentence; nothing was started and nothing written."""
    sentence = _one_sentence(command.wait(), command.said)
    assert all(word in sentence for word in words), sentence
    assert not command.folders


# ------------------------------------------------------------------------ refused before a start

NOBODY = f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ((BATCHING, "--set", "flags.enable-prefix-cachin=true"), ("enable-prefix-caching?",)),
        ((BATCHING, "--set", "window=3"), ("'window'", "window_s?")),
        ((BATCHING, "--set", "window_s=-1"), ("window_s", "greater than 0", "-1")),
        (
            (BATCHING, "--set", 'workloads.fixed.loads=["wave:8"]'),
            ("'wave:8'", "waves:<size>"),
        ),
        ((BATCHING, "--set", "flags.max-model-len=64"), ("max-model-len=64", "raise")),
        ((BATCHING, "--model", "/no/such/folder"), ("MODEL=/no/such/folder", "give")),
        (("continous-batching",), ("'continous-batching'", *EVERY_LAB)),
        ((BATCHING, "--endpoint", NOBODY), (f"ENDPOINT={NOBODY}", "start the server")),
        (("prefix-caching", "--endpoint", NOBODY), ("prefix-caching", "its own engines")),
    ],
    ids=lambda typed: "nobody" if typed[-1] == NOBODY else typed[-1],  # its port is drawn anew
)
def test_what_cannot_be_is_named_before_anything_starts(
    typed: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In this process, which need not load the program anew."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)  # others of this process have runs in theirs
    monkeypatch.setenv(gpus.VARIABLE, "")
    monkeypatch.setenv("COLUMNS", "1000")
    taken = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    shown = CliRunner().invoke(cli.app, ["run", *typed])
    for signum, handler in taken.items():
        signal.signal(signum, handler)
    sentence = _one_sentence(shown.exit_code, shown.output)
    assert all(word in sentence for word in words), sentence
    assert not list(tmp_path.glob("*/*/*"))


def test_a_cache_that_holds_no_request_is_named_before_anything_starts(reader: Reader) -> None:
    command = reader.types("run", BATCHING, SET="flags.kv-cache-memory-bytes=65536")
    _plainly_refused(command, "one request", "raise")
    assert not reader.engine_starts()


# -------------------------------------------------------------------------- engines that fail


def test_an_engine_that_cannot_start_shows_its_last_lines(reader: Reader) -> None:
    message = "ValueError: no room"
    command = reader.types("run", BATCHING, SET=SHORT, engine=("--fail-start", message))
    assert command.wait() == 1
    assert f"exit code 1: {message}" in command.said
    assert 'File "vllm/v1/engine/core.py"' in command.said.split(message)[1]
    assert not command.folder.complete
    assert not _results(command.folder)
    assert (command.folder.path / "predictions.json").exists()
    assert not reader.processes()


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reader, Command]]:
    """A run whose first engine dies in the middle of the first trial."""
    with reading(tmp_path_factory.mktemp("died") / "reader") as someone:
        command = someone.types("run", BATCHING, SET=SHORT, first_engine=("--die-after", "60"))
        command.wait()
        yield someone, command


def test_an_engine_that_dies_costs_its_trial_alone(died: tuple[Reader, Command]) -> None:
    reader, command = died
    assert command.process.returncode == 1, command.said
    folder = command.folder
    results = _results(folder)
    (failed,) = (r for r in results if r.failed)
    assert len(results) == SHORT_TRIALS
    assert len(reader.engine_starts()) == 2  # the trials after it got another
    assert "base ended with exit code 1" in (failed.failed or "")
    assert (failed.summary, failed.engine, failed.cpu_steal) == (None, None, None)
    assert all(r.summary and r.engine for r in results if r is not failed)
    summary = folder.summary()
    assert failed.repeat not in summary.measurements[failed.point]
    assert list(summary.failed) == [f"{failed.point}/{failed.repeat}"]
    assert not reader.processes()


def test_a_run_with_a_failed_trial_looks_unfinished(died: tuple[Reader, Command]) -> None:
    reader, command = died
    folder = command.folder
    report = (folder.path / "report.md").read_text()
    assert not folder.complete
    assert "not complete" in report
    assert "base ended with exit code 1" in report
    assert "RESUME=1" in command.said
    check = reader.types("check", str(folder.path))
    assert check.wait() == 1
    assert "COMPLETE" in check.said


@needs_prometheus
def test_prometheus_agrees_though_a_trial_failed(died: tuple[Reader, Command]) -> None:
    session = died[1].folder.session()
    assert session
    assert all(a.prometheus == a.records == a.engine for a in session.agreement)


def test_an_engine_that_falls_silent_costs_its_trial_alone(reader: Reader) -> None:
    """It takes requests and answers nothing: the next trial gets another engine."""
    command = reader.types(
        "run", BATCHING, SET=f"{SHORT} timeout_s=2", program=LABS_WITHOUT_PROMETHEUS,
        first_engine=("--silent-at", "/v1/chat/completions"),
    )  # fmt: skip
    assert command.wait() == 1, command.said
    assert len(reader.engine_starts()) == 2
    results = _results(command.folder)
    assert len(results) == SHORT_TRIALS
    (failed,) = (r.failed for r in results if r.failed)
    assert "2 s" in failed
    assert not reader.processes()


STATIC = (
    "warmup_s=0.1 window_s=0.5 repeats=1 most_repeats=0 requests=64"
    ' workloads.fixed.loads=["concurrent:2"] workloads.exponential.loads=["concurrent:4","waves:4"]'
    " claims.static.treatment.load=concurrent:4 claims.static.baseline.load=waves:4"
)


@pytest.fixture(scope="module")
def erring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A run on an engine that answers each fifth request with an error, without Prometheus."""
    with reading(tmp_path_factory.mktemp("erring") / "reader") as someone:
        command = someone.types(
            "run",
            BATCHING,
            SET=STATIC,
            engine=("--error-every", "5"),
            program=LABS_WITHOUT_PROMETHEUS,
        )
        command.wait()
        yield command


def test_errors_allow_no_verdict(erring: Command) -> None:
    folder = erring.folder
    summary, report = folder.summary(), (folder.path / "report.md").read_text()
    (judged,) = (j for j in summary.judgements if j.claim == "static")
    assert judged.outcome == "not valid"
    assert "errors" in judged.why
    assert judged.prediction_outcome == "open"
    assert {c.point for c in summary.caveats if c.name == "errors" and c.blocks} == {
        point.key for point in folder.run().points()
    }
    assert re.search(r"\d+ of \d+ .* HTTP 500", report)
    assert "EngineCore failed" in report  # in the server's words
    failed = [r for r in _records(folder) if not r.ok]
    assert failed
    assert all(r.ttft_s is None and r.output_tokens is None for r in failed)


def test_without_prometheus_a_run_goes_on_and_says_so(erring: Command) -> None:
    assert "make setup" in erring.said
    session = erring.folder.session()
    assert session
    assert all(agreement.prometheus is None for agreement in session.agreement)
    assert all(agreement.records for agreement in session.agreement)
    assert "not installed" in (erring.folder.path / "report.md").read_text()


@pytest.fixture(scope="module")
def generator_died(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reader, Command]]:
    """A run whose Locust is killed, on an engine that answers none of the fixed workload."""
    settings = f"{SHORT} repeats=2 workloads.fixed.output_tokens.tokens=17"
    with reading(tmp_path_factory.mktemp("generator") / "reader") as someone:
        command = someone.types(
            "run", BATCHING, SET=settings, engine=("--error-tokens", "17"),
            program=LABS_WITHOUT_PROMETHEUS,
        )  # fmt: skip
        command.until(TRIAL_ENDED)
        the_program("locust", command.family()).kill()
        command.wait()
        yield someone, command


def test_a_load_generator_that_dies_costs_its_trial_alone(
    generator_died: tuple[Reader, Command],
) -> None:
    reader, command = generator_died
    assert command.process.returncode == 1, command.said
    results = _results(command.folder)
    assert len(results) == 4
    assert len([r for r in results if "Locust ended" in (r.failed or "")]) == 1
    assert "Broken pipe" not in command.said
    assert not command.folder.complete
    assert not reader.processes()


def test_a_trial_without_an_answer_has_failed(generator_died: tuple[Reader, Command]) -> None:
    _, command = generator_died
    by_workload: dict[str, list[str]] = {"exponential": [], "fixed": []}
    for result in _results(command.folder):
        if "Locust ended" not in (result.failed or ""):
            by_workload[result.point.split("/")[1]].append(result.failed or "")
    assert not any(by_workload["exponential"])
    assert by_workload["fixed"]
    for reason in by_workload["fixed"]:
        assert "HTTP 500: " in reason


def test_a_load_process_does_not_outlive_its_master_and_guard(tmp_path: Path) -> None:
    argv = generator.argv(1, free_port(), free_port())
    with Process("locust", argv, log=tmp_path / "locust.log", talk=True) as child:
        generator.Generator(child)
        guard = psutil.Process(child.pid)
        family = guard.children(recursive=True)
        assert len(family) == 2
        guard.kill()
        assert not still_alive(family)


# ------------------------------------------------------ faults that leave figures, and no verdict

PAIRS = (
    "warmup_s=0.1 window_s=0.5 repeats=1 most_repeats=0 requests=128"
    ' workloads.exponential.loads=["concurrent:4","waves:4","concurrent:1"]'
    ' workloads.fixed.loads=["concurrent:4","waves:4"]'
    + "".join(
        f" claims.{claim}.{side}.load={load}"
        for claim, sides in {
            "static": ("concurrent:4", "waves:4"),
            "static-fixed": ("concurrent:4", "waves:4"),
            "throughput": ("concurrent:4", "concurrent:1"),
            "tpot": ("concurrent:4", "concurrent:1"),
        }.items()
        for side, load in zip(("treatment", "baseline"), sides, strict=True)
    )
)
EVERY_CLAIM = {"static", "static-fixed", "throughput", "tpot"}
SLOWED = (
    "-c",
    "from pathlib import Path; import loadtests.generator as g\n"
    "g.LOCUSTFILE = Path('tests/fake/slowed.py').resolve()\n"
    "from tests.fake.bare import app; app()",
)


def _no_verdict_for(caveat: str, command: Command) -> set[str]:
    """Wherever it hit there is none, the report says why, and what to do; the claims it hit."""
    folder = command.folder
    summary, report = folder.summary(), (folder.path / "report.md").read_text()
    hit = [c for c in summary.caveats if c.name == caveat and c.blocks]
    assert hit, [(c.name, c.text) for c in summary.caveats]
    withheld = set()
    for j in summary.judgements:
        if any(c.hits(j.metric, j.treatment, j.baseline) for c in hit):
            assert j.outcome == "not valid"
            assert caveat in j.why
            assert (j.expected, j.prediction_outcome) == (None, "open")
            withheld.add(j.claim)
    assert hit[0].text in report
    return withheld


@pytest.mark.parametrize(
    ("caveat", "claims", "engine"),
    [
        ("treatment not applied", EVERY_CLAIM, ("--drop", "enable-prefix-caching")),
        ("several tokens a chunk", {"tpot"}, ("--tokens-per-chunk", "4")),
    ],
)
def test_a_fault_is_noticed_and_ends_in_no_verdict(
    caveat: str, claims: set[str], engine: tuple[str, ...], reader: Reader
) -> None:
    command = reader.types(
        "run", BATCHING, SET=PAIRS, engine=engine, program=LABS_WITHOUT_PROMETHEUS
    )
    command.wait()
    assert _no_verdict_for(caveat, command) == claims


def test_disturbed_trials_are_measured_again_twice_and_then_have_no_verdict(
    reader: Reader,
) -> None:
    """The load generator stands still three quarters of the time."""
    command = reader.types("run", BATCHING, SET=PAIRS, program=SLOWED, DISTURBED="")
    assert command.wait() == 0, command.said
    results = _results(command.folder)
    assert len(results) == command.said.count("(2 of 2 times)") == 5
    for result in results:
        assert len(result.discarded) == 2
        assert all("generator's loop lagged" in d.reasons for d in result.discarded)
    assert _no_verdict_for("generator's loop lagged", command) == EVERY_CLAIM
    counted = command.folder.session()
    assert counted
    assert all(a.records == a.engine for a in counted.agreement)


# --------------------------------------------------------------------------- the runner is stopped


def _nothing_is_left(
    command: Command,
    family: list[psutil.Process],
    sockets: set[str],
    reader: Reader,
    trials: int,
) -> None:
    """No process, no open port, no lock, and nothing that looks complete; the rest is readable."""
    assert len(family) >= 5  # guards, Locust's two processes, the engine
    assert not still_alive(family)
    assert not reader.processes()
    assert "Traceback" not in command.said
    assert len(sockets) >= 2  # of the engine, and of Locust's first process
    assert not still_listening(sockets)
    folder = command.folder
    assert not folder.complete
    assert not (folder.path / "report.md").exists()
    assert 1 <= len(_results(folder)) < trials
    assert _records(folder)
    assert all(record.ok for record in _records(folder))
    with (reader.scratch / OWN_FOLDER / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_ctrl_c_that_falls_into_a_finalizer_is_not_lost(reader: Reader) -> None:
    """As happens when it comes while a connection is collected: seen once in thirty runs."""
    program = (
        "-c",
        "import os, signal, serving.engines.base as base\n"
        "class Collected:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "collected, read = [Collected()], base.metrics_text\n"
        "base.metrics_text = lambda url: collected.clear() or read(url)\n"
        "from labs.harness.cli.cli import app; app()",
    )
    command = reader.types("run", BATCHING, SET=SHORT, program=program)
    assert command.wait() == 130, command.said
    assert "Traceback" not in command.said
    assert not command.folder.complete


@dataclass(frozen=True)
class Stopped:
    """A run whose first trial failed and whose third SIGTERM stopped; what was there by then."""

    reader: Reader
    command: Command
    second: Command  # another lab, asked for meanwhile
    otherwise: Command  # the same lab, resumed with another engine
    family: list[psutil.Process]
    sockets: set[str]
    predictions: Predictions
    finished: dict[tuple[str, int], tuple[TrialResult, list[RequestRecord]]]
    requests: int


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    with reading(tmp_path_factory.mktemp("stopped") / "reader") as reader:
        command = reader.types("run", BATCHING, SET=LONGER, first_engine=("--die-after", "60"))
        command.until("Predicted, before any engine starts")
        command.process.send_signal(signal.SIGSTOP)  # so that it cannot end meanwhile
        with reading(tmp_path_factory.mktemp("second") / "reader") as other:
            second = other.types("run", BATCHING, SET=LONGER, SCRATCH=str(reader.scratch))
            second.wait()
        command.process.send_signal(signal.SIGCONT)
        command.until(TRIAL_ENDED)
        family = command.family()
        sockets = listening_sockets(family)
        command.process.terminate()
        command.wait()
        log = reader.engine_log()
        otherwise = reader.types("run", BATCHING, SET=LONGER, RESUME="1", engine=("--seed", "1"))
        otherwise.wait()
        yield Stopped(
            reader,
            command,
            second,
            otherwise,
            family,
            sockets,
            command.folder.predictions(),
            _finished(command),
            len(log),
        )


def _finished(command: Command) -> dict[tuple[str, int], tuple[TrialResult, list[RequestRecord]]]:
    """The trials that succeeded, with their records."""
    run = command.folder.run()
    return {
        (point.key, result.repeat): (result, trial.records)
        for point, result, trial in command.folder.trials(run.points(), run.rebuilt_lab())
        if trial
    }


def test_nothing_outlives_a_runner_that_is_terminated(stopped: Stopped) -> None:
    assert stopped.command.process.returncode == 143
    _nothing_is_left(
        stopped.command, stopped.family, stopped.sockets, stopped.reader, LONGER_TRIALS
    )


def test_a_second_lab_is_told_to_wait(stopped: Stopped) -> None:
    _plainly_refused(stopped.second, "another lab", "wait")


def test_a_run_is_not_continued_on_another_engine(stopped: Stopped) -> None:
    refused, run = stopped.otherwise, stopped.command.folder.path
    assert refused.process.returncode == 1, refused.said
    (sentence,) = (line for line in refused.said.splitlines() if line.startswith("error:"))
    for words in (str(run), "engine.command:", "then", "now", "without RESUME=1"):
        assert words in sentence
    assert "serves at" not in refused.said


@pytest.fixture(scope="module")
def resumed(stopped: Stopped) -> Command:
    command = stopped.reader.types(
        "run", BATCHING, SET=LONGER, RESUME="1", first_engine=("--die-after", "60")
    )
    command.wait()
    return command


def test_resume_keeps_what_is_finished_and_plays_what_failed_or_is_missing(
    stopped: Stopped, resumed: Command
) -> None:
    assert resumed.process.returncode == 0, resumed.said
    folder = resumed.folder  # the only one
    assert folder.complete
    assert folder.predictions() == stopped.predictions
    assert stopped.finished
    assert _finished(resumed).items() >= stopped.finished.items()
    assert len(_results(folder)) == LONGER_TRIALS
    assert not [r for r in _results(folder) if r.failed]  # tried again
    check = stopped.reader.types("check", str(folder.path))
    assert check.wait() == 0, check.said


def test_what_is_counted_after_a_resume_is_exact(stopped: Stopped, resumed: Command) -> None:
    session = resumed.folder.session()
    assert session
    requests = len(stopped.reader.engine_log()) - stopped.requests
    (found,) = (a for a in session.agreement if a.what == "requests")
    assert (found.records, found.engine) == (requests, requests)


@needs_prometheus
def test_prometheus_counts_a_resumed_sitting_alone(resumed: Command) -> None:
    session = resumed.folder.session()
    assert session
    assert all(a.prometheus == a.records for a in session.agreement)
