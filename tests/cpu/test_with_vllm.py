"""An engine that is forked from a process which has imported vLLM, as most of these tests' are."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.hardware import machine
from tests import with_vllm
from tests.shallow import shallow

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]


@pytest.fixture
def asker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """What asks for the program that starts an engine, as a test asks for a lab's run."""
    with_vllm.start()
    argv = with_vllm.argv_of("tests.one_engine", str(shallow()), str(tmp_path / "engine.log"))
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def _about(asker: subprocess.Popen[str]) -> dict[str, Any]:
    assert asker.stdout
    about = json.loads(asker.stdout.readline() or "{}")
    assert about, "the program ended"
    return dict(about)


def _wait_until_ended(pids: list[int]) -> None:
    end_s = time.monotonic() + 60
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < end_s, left
        time.sleep(0.1)


def test_it_is_below_the_run_that_started_it_and_ends_as_it_is_told(
    asker: subprocess.Popen[str],
) -> None:
    about = _about(asker)
    guard = psutil.Process(about["guard"])
    assert guard.ppid() == about["run"]
    assert "--serve" in guard.cmdline(), "it has been forked"
    assert about["below"]
    assert about["served"]
    asker.communicate("", timeout=60)
    assert asker.returncode == 0
    _wait_until_ended([about["guard"], *about["below"]])


def test_nothing_is_left_of_it_when_who_asked_is_killed(asker: subprocess.Popen[str]) -> None:
    about = _about(asker)
    asker.send_signal(signal.SIGKILL)
    _wait_until_ended([about["run"], about["guard"], *about["below"]])
