"""The process that times reference steps."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from serving.hardware import machine, reference_step
from serving.hardware.reference_step import ReferenceStep, ReferenceTimer
from serving.processes.process import Process

STEP = ReferenceStep(reading_s=0.010, computing_s=0.005)


def test_the_process_times_steps_on_the_engines_cores_and_ends_with_the_block(
    tmp_path: Path,
) -> None:
    with reference_step.started("cpu", tmp_path / "log") as timer:
        first, second = timer.time(), timer.time()
        (child,) = psutil.Process(timer.process.pid).children()
        assert tuple(child.cpu_affinity()) == machine.split_cores()[0]
    assert first
    assert second
    assert not child.is_running()


def test_a_process_that_died_times_nothing_more(tmp_path: Path) -> None:
    with reference_step.started("cpu", tmp_path / "log") as timer:
        assert timer.time()
        (child,) = psutil.Process(timer.process.pid).children()
        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
        assert timer.time() is None
        assert timer.time() is None


def test_the_first_answer_has_time_for_the_process_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_step, "ANSWER_LIMIT_S", 0.2)
    late = "import sys, time; [(time.sleep(1), print(sys.argv[1], flush=True)) for _ in sys.stdin]"
    argv = [sys.executable, "-c", late, STEP.model_dump_json()]
    with Process("late", argv, log=tmp_path / "log", talk=True) as process:
        timer = ReferenceTimer(process)
        assert [timer.time(), timer.time()] == [STEP, None]
