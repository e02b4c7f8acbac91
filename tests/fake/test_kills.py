"""A run whose runner, or whose engine, is killed at each of its stages.

Nothing that the run started outlives it, nothing looks complete that is not, and `RESUME=1` makes
the run whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from labs.harness.storage.recorded import TrialResult
from tests.fake.conftest import Command, Reader, reading, still_alive
from tests.processes import listening_sockets, still_listening

LAB = "prefix-caching"  # two engines, the second of which is probed
IN_TURN, IN_TURN_WITHOUT_PROMETHEUS = (
    (
        "-c",
        "import labs.harness.runner.run as run\n"
        "run.resident_groups = lambda setup, _: [[variant] for variant in setup.lab.variants]\n"
        f"from tests.fake.{module} import app; app()",
    )
    for module in ("quiet", "bare")
)  # as where the memory is too small for both
ONE_LOAD = (
    'workloads=["share-0"] workloads.share-0.loads=["concurrent:1"]'
    " workloads.share-0.prompt_tokens.tokens=64 repeats=1 most_repeats=0"
)
WARMUP_S = 1.0
IN_ITS_FIRST_TRIAL = f"{ONE_LOAD} warmup_s={WARMUP_S:g} window_s=1"
BEYOND_IT = f"{ONE_LOAD} warmup_s=.1 window_s=.3"


@dataclass(frozen=True)
class Stage:
    """A part of a run, told by what the run and its engines have written by then."""

    reached: Callable[[Reader], bool]
    settings: str
    trials: int  # that have ended before it


@pytest.fixture(autouse=True)
def _hanging_up_is_not_ignored() -> Iterator[None]:
    """Under nohup it is, and stays so in all that is started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def _last_engine(reader: Reader) -> Path:
    """The arguments of the engine that was started last, in a file that is named after its pid."""
    return max(reader.engines.glob("*.argv"), key=lambda path: path.stat().st_mtime_ns)


def _under_load_s(reader: Reader) -> float:
    """The time between its first and its last request, of those answered; -1 where none was."""
    if not reader.engine_starts():
        return -1.0
    log = _last_engine(reader).with_suffix(".jsonl")
    lines = log.read_text().splitlines() if log.exists() else []
    received = [float(json.loads(line)["received"]) for line in lines]
    return received[-1] - received[0] if received else -1.0


def _is_probed(reader: Reader) -> bool:
    return any(line["n_out"] == 1 for line in reader.engine_log())  # answers of a load have more


def _has(reader: Reader, file: str) -> bool:
    """Whether the run has this file; it appears whole."""
    return any(reader.results.glob(f"*/*/*/{file}"))


STAGES = {
    "set-up": Stage(lambda reader: _has(reader, "predictions.json"), IN_ITS_FIRST_TRIAL, 0),
    "start": Stage(lambda reader: len(reader.engine_starts()) == 1, IN_ITS_FIRST_TRIAL, 0),
    "warm-up": Stage(lambda reader: _under_load_s(reader) >= 0, IN_ITS_FIRST_TRIAL, 0),
    "window": Stage(lambda reader: _under_load_s(reader) > WARMUP_S, IN_ITS_FIRST_TRIAL, 0),
    "turn": Stage(lambda reader: len(reader.engine_starts()) == 2, BEYOND_IT, 1),
    "probe": Stage(_is_probed, BEYOND_IT, 2),
    "report": Stage(lambda reader: _has(reader, "session.json"), BEYOND_IT, 2),
}
"""In the order of a run: the load generator and Prometheus start; the first engine starts; its
trial is warmed up, and measured; the second engine starts in its place; it is probed after its
trial; what was measured is judged and written."""


def _begin(
    reader: Reader, settings: str, resume: bool = False, program: tuple[str, ...] = IN_TURN
) -> Command:
    return reader.types("run", LAB, SET=settings, program=program, RESUME="1" if resume else "0")


def _reach(name: str, reader: Reader, command: Command) -> None:
    """Wait until the run has reached this stage."""
    deadline = time.monotonic() + 300
    while not STAGES[name].reached(reader):
        assert command.process.poll() is None, f"it ended before its {name}:\n{command.said}"
        assert time.monotonic() < deadline, f"it never came to its {name}:\n{command.said}"
        time.sleep(0.02)


def _results(command: Command) -> list[TrialResult]:
    found = (command.folder.trial_result(p, 1) for p in command.folder.run().points())
    return [result for result in found if result]


def _nothing_is_left(reader: Reader, command: Command) -> None:
    """No process and no lock."""
    assert not still_alive(reader.processes()), command.said
    for lock in reader.home.rglob("run.lock"):  # of runs, and of Prometheus's data
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _end_it_and_all_that_it_started(sign: signal.Signals, reader: Reader, command: Command) -> None:
    """Send the runner a signal; it ends by it, and no process, lock or listening socket is left."""
    family = command.family()
    sockets = listening_sockets(family)
    command.process.send_signal(sign)
    assert command.wait() == (-sign if sign == signal.SIGKILL else 128 + sign), command.said
    assert not still_alive(family)
    _nothing_is_left(reader, command)
    assert not still_listening(sockets)


OF_RUNNER = [stage for stage in STAGES if stage != "warm-up"]  # to a runner a part of its trial
RUNNER_CELLS = [
    *((signal.SIGKILL, stage) for stage in OF_RUNNER),
    # a runner handles these three alike: each stage meets one of them, in turn
    *zip(itertools.cycle((signal.SIGTERM, signal.SIGHUP, signal.SIGINT)), OF_RUNNER, strict=False),
]
RESUMED = [(signal.SIGKILL, "turn"), (signal.SIGINT, "report")]


@pytest.mark.parametrize(
    ("sign", "name"), RUNNER_CELLS, ids=[f"{sign.name}-{name}" for sign, name in RUNNER_CELLS]
)
def test_nothing_outlives_a_runner(sign: signal.Signals, name: str, reader: Reader) -> None:
    stage = STAGES[name]
    command = _begin(reader, stage.settings)
    _reach(name, reader, command)
    _end_it_and_all_that_it_started(sign, reader, command)
    assert command.said.count("Stopping") == (sign != signal.SIGKILL)
    assert ("RESUME=1" in command.said) == (sign != signal.SIGKILL)
    assert "Traceback" not in command.said
    assert "error:" not in command.said
    assert not command.folder.complete
    finished = _results(command)
    assert len(finished) == stage.trials
    if (sign, name) in RESUMED:
        again = _begin(reader, stage.settings, resume=True)
        assert again.wait() == 0, again.said
        assert again.folder.complete  # the only one
        assert all(result in _results(again) for result in finished)
        assert len(_results(again)) == 2
        assert again.folder.probe_result("salt", "on")


@pytest.mark.parametrize("users", [1, 2])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM], ids=lambda sign: sign.name)
def test_nothing_outlives_a_runner_while_an_engine_is_suspended(
    sign: signal.Signals, users: int, reader: Reader
) -> None:
    """Two stay loaded together. One user's requests go to both in turn, those of two to one."""
    settings = IN_ITS_FIRST_TRIAL.replace("concurrent:1", f"concurrent:{users}")
    command = reader.types("run", LAB, SET=settings)
    deadline = time.monotonic() + 300
    while not (suspended := _suspended(command)):
        assert command.process.poll() is None, command.said
        assert time.monotonic() < deadline, command.said
        time.sleep(0.02)
    assert len(reader.engine_starts()) == 2
    assert len(suspended) == 1  # the fake engine is one process
    _end_it_and_all_that_it_started(sign, reader, command)


def _suspended(command: Command) -> list[psutil.Process]:
    suspended = []
    for process in command.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                suspended.append(process)
    return suspended


def _kill_engine(name: str, reader: Reader, command: Command) -> set[str]:
    """Kill the engine once the run has reached this stage; the sockets of the run by then."""
    _reach(name, reader, command)
    sockets = listening_sockets(command.family())
    os.kill(int(_last_engine(reader).stem), signal.SIGKILL)
    return sockets


def test_engines_that_are_killed_as_they_start(reader: Reader) -> None:
    command = _begin(reader, IN_ITS_FIRST_TRIAL, program=IN_TURN_WITHOUT_PROMETHEUS)
    sockets = _kill_engine("start", reader, command) | _kill_engine("turn", reader, command)
    assert command.wait() == 1, command.said
    _nothing_is_left(reader, command)
    assert not still_listening(sockets)
    assert "Traceback" not in command.said
    for name in ("off", "on"):
        assert f"{name} ended with exit code 137 (SIGKILL" in command.said
    assert not command.folder.complete


@dataclass(frozen=True)
class Killed:
    """A run that lost its first engine in a warm-up and its second in a window, and its second
    sitting, which lost the second engine in its probe."""

    reader: Reader
    first: Command
    failed: list[str]
    complete: bool
    second: Command


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    with reading(tmp_path_factory.mktemp("killed") / "reader") as reader:
        program = IN_TURN_WITHOUT_PROMETHEUS
        first = _begin(reader, IN_ITS_FIRST_TRIAL, program=program)
        sockets = _kill_engine("warm-up", reader, first)
        _reach("turn", reader, first)
        sockets |= _kill_engine("window", reader, first)
        first.wait()
        _nothing_is_left(reader, first)
        assert not still_listening(sockets)
        failed = [result.failed or "" for result in _results(first)]
        complete = first.folder.complete
        second = _begin(reader, IN_ITS_FIRST_TRIAL, resume=True, program=program)
        sockets = _kill_engine("probe", reader, second)
        second.wait()
        _nothing_is_left(reader, second)
        assert not still_listening(sockets)
        yield Killed(reader, first, failed, complete, second)


def test_an_engine_that_is_killed_under_load_costs_its_trial(killed: Killed) -> None:
    assert killed.first.process.returncode == 1, killed.first.said
    assert "Traceback" not in killed.first.said
    assert "RESUME=1" in killed.first.said
    assert not killed.complete
    assert len(killed.failed) == 2
    for reason in killed.failed:
        assert "137 (SIGKILL" in reason


def test_an_engine_that_is_killed_in_its_probe_costs_the_probe(killed: Killed) -> None:
    """The run is whole without it: what the probe would have found is told as missing."""
    command = killed.second
    assert command.process.returncode == 0, command.said
    assert "Traceback" not in command.said
    assert command.said.count("on: the probe salt") == 1
    assert not command.folder.probe_result("salt", "on")
    assert command.folder.complete  # the only one
    assert not any(result.failed for result in _results(command))
